#!/usr/bin/env bash
# Throughput and latency of the engine over veth, in network namespaces that this script makes and that vanish with it:
#
#   gen0 (namespace gen) --- dut0 -- route or bridge -- tun0 -- engine -- back, or tun1 -- route or bridge -- out0 --- sink0
#
# Makes the links, then runs `tun-driver throughput` between them. Letters are those of the kernel's pktgen sample scripts
# (samples/pktgen/README.rst), each also an environment variable.
set -euo pipefail
# A word such as * is taken as it was given.
set -f

self=$(readlink -f "$0")
root=$(dirname "$(dirname "$self")")
began_in=$PWD
# Where cargo builds, for whoever has it build elsewhere; what is relative is so to the folder it runs in.
target_dir=$(cd "$root" && readlink -m "${CARGO_TARGET_DIR:-target}")
# ip and ethtool are there, which users' paths do not always have.
PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin

usage() {
    cat <<USAGE
usage: bench-scripts/pktgen.sh [OPTIONS]

Without options: about three minutes; receive, send and echo at 64 and 1518 bytes, the rates without loss, and latencies.

as the kernel's pktgen sample scripts (environment variable, default):
  -i NAME     the generator's link (DEV, gen0)
  -s BYTES    frame without its 4 bytes of check sequence (PKT_SIZE, 60); --sizes counts them
  -d ADDRESS  target address (DEST_IP, 198.19.0.2 or fd00:19::2)
  -m MAC      target hardware address (DST_MAC, that of the next link)
  -p PORT     target port (DST_PORT, 9)
  -t THREADS  threads of pktgen (THREADS, 1)
  -f CPU      the generator's first CPU (F_THREAD, 0)
  -c COUNT    copies of each buffer (SKB_CLONE, 0): veth takes 0 only
  -n COUNT    packets of each trial, 0 for a time (COUNT, 0)
  -b COUNT    burst of the link (BURST, 1): veth takes 1 only
  -w NS       gap between packets, 0 for none (DELAY, 0)
  -6          IPv6 (IP6)
  -v          tell of each trial (VERBOSE)
  -x          print each command (DEBUG)
  -a          keep what pktgen is configured to do (APPEND)
  -h          this text

ours:
  --gen auto|pktgen|builtin      who makes the packets (auto: the kernel's module where it is to be had)
  --topology bridge|route        TAP in a bridge, or TUN behind a route (route)
  --mode MODE,…                  recv, recv-many, send, send-many, echo, forward (recv-many,send-many,echo)
  --backend io_uring|syscalls    how the engine talks to the kernel (the best that there is)
  --offloads on|off              whether the engine's devices have all offloads that the kernel grants (OFFLOADS, off)
  --queues N                     queues, each with a worker (1)
  --flows N                      flows, by source port (64)
  --sizes BYTES,…|imix           frames with check sequence (64,1518)
  --rate N                       packets per second instead of a search: 200000, 200k, 1.5M
  --search ndr,pdr|none          goals: no loss, 0.5 % loss; none measures the maximum only (ndr,pdr)
  --duration SECONDS             length of the trials that decide (1)
  --repeat N                     searches (3)
  --no-latency                   leave the latency runs out
  --out DIR                      folder for the report (results/pktgen)
  --json                         print JSON instead of tables
  --dry-run                      print what would be done, and do nothing
  --keep                         keep the namespaces until Ctrl-C or the end of standard input
  --install                      install missing tools by apt-get

exit codes: 0 done, 1 failed (also: books that do not balance), 2 usage, 77 the host lacks something,
130 interrupted: what was measured is written, and marked as incomplete
USAGE
}

die() {
    local code=$1
    shift
    echo "pktgen.sh: $*" >&2
    exit "$code"
}

# What is asked for, from the environment first.
dev=${DEV:-gen0} pkt_size=${PKT_SIZE:-} dest_ip=${DEST_IP:-} dst_mac=${DST_MAC:-} dst_port=${DST_PORT:-9}
threads=${THREADS:-1} first_thread=${F_THREAD:-0} clone=${SKB_CLONE:-0} count=${COUNT:-0} burst=${BURST:-1}
delay=${DELAY:-0} ip6=${IP6:-} verbose=${VERBOSE:-} debug=${DEBUG:-} append=${APPEND:-}
offloads=${OFFLOADS:-off}
gen=auto topology=route mode=recv-many,send-many,echo backend='' queues=1 flows=64 sizes='' rate='' search='ndr,pdr'
duration=1 repeat=3 latency=true out='' json='' dry_run='' keep='' install=''
words=("$@")

# A variable of 0 is off, as an empty one.
for switch in ip6 verbose debug append; do
    [ "${!switch}" != 0 ] || printf -v $switch ''
done

takes_value() {
    case $1 in
    -[isdmptfcnbw] | --gen | --topology | --mode | --backend | --offloads | --queues | --flows | --sizes | --rate | --search | --duration | --repeat | --out) ;;
    *) return 1 ;;
    esac
}

# Letters may stand together, and their values at once behind them. What follows an option that takes a value is its value.
arguments=()
while [ $# -gt 0 ]; do
    case $1 in
    --*=*)
        takes_value "${1%%=*}" || die 2 "${1%%=*} takes no value, or is no option; see -h"
        arguments+=("${1%%=*}" "${1#*=}")
        ;;
    --* | - | -[isdmptfcnbw])
        arguments+=("$1")
        if takes_value "$1" && [ $# -gt 1 ]; then arguments+=("$2") && shift; fi
        ;;
    -[6vxah]?*) arguments+=("${1:0:2}") && set -- "$1" "-${1:2}" "${@:2}" ;;
    -[isdmptfcnbw]?*) arguments+=("${1:0:2}" "${1:2}") ;;
    *) arguments+=("$1") ;;
    esac
    shift
done
set -- "${arguments[@]+"${arguments[@]}"}"

value() {
    if [ $# -lt 2 ] || [[ -z $2 || $2 == --* ]]; then die 2 "$1 wants a value; see -h"; fi
    printf '%s' "$2"
}
while [ $# -gt 0 ]; do
    option=$1
    case $option in
    -6) ip6=1 ;;
    -v) verbose=1 ;;
    -x) debug=1 ;;
    -a) append=1 ;;
    -h | --help) usage && exit 0 ;;
    --no-latency) latency=false ;;
    --json) json=1 ;;
    --dry-run) dry_run=1 ;;
    --keep) keep=1 ;;
    --install) install=1 ;;
    -[isdmptfcnbw] | --gen | --topology | --mode | --backend | --offloads | --queues | --flows | --sizes | --rate | --search | --duration | --repeat | --out)
        argument=$(value "$@")
        shift
        case $option in
        -i) dev=$argument ;;
        -s) pkt_size=$argument ;;
        -d) dest_ip=$argument ;;
        -m) dst_mac=$argument ;;
        -p) dst_port=$argument ;;
        -t) threads=$argument ;;
        -f) first_thread=$argument ;;
        -c) clone=$argument ;;
        -n) count=$argument ;;
        -b) burst=$argument ;;
        -w) delay=$argument ;;
        --gen) gen=$argument ;;
        --topology) topology=$argument ;;
        --mode) mode=$argument ;;
        --backend) backend=$argument ;;
        --offloads) offloads=$argument ;;
        --queues) queues=$argument ;;
        --flows) flows=$argument ;;
        --sizes) sizes=$argument ;;
        --rate) rate=$argument ;;
        --search) search=$argument ;;
        --duration) duration=$argument ;;
        --repeat) repeat=$argument ;;
        --out) out=$argument ;;
        esac
        ;;
    *) die 2 "$option: no such option; see -h" ;;
    esac
    shift
done
[ -z "$debug" ] || set -x

one_of() {
    local name=$1 given=$2
    shift 2
    local word
    for word in "$@"; do [ "$given" = "$word" ] && return 0; done
    die 2 "$name $given: one of $* is possible"
}
# number OPTION GIVEN LEAST MOST [VARIABLE]
number() {
    if [[ $2 =~ ^[0-9]{1,10}$ ]] && [ "$2" -ge "$3" ] && [ "$2" -le "$4" ]; then return 0; fi
    die 2 "$1 $2${5:+ ($5)}: a number from $3 to $4 is possible"
}
one_of --gen "$gen" auto pktgen builtin
one_of --topology "$topology" bridge route
[ -z "$backend" ] || one_of --backend "$backend" io_uring syscalls
one_of --offloads "$offloads" on off
# Words with commas between them, none of them twice.
list() {
    local given=$2 word rest
    [[ $given =~ ^[^,[:space:]]+(,[^,[:space:]]+)*$ ]] || die 2 "$1 $given: a list of words with commas between them is wanted"
    for word in ${given//,/ }; do
        rest=,$given,
        rest=${rest/",$word,"/,}
        [[ $rest != *,"$word",* ]] || die 2 "$1 $given: $word is given twice"
    done
}
list --mode "$mode"
list --search "$search"
[ -z "$sizes" ] || list --sizes "$sizes"
for word in ${mode//,/ }; do one_of --mode "$word" recv recv-many send send-many echo forward; done
for word in ${search//,/ }; do one_of --search "$word" ndr pdr none; done
[[ $search = none || ,$search, != *,none,* ]] || die 2 "--search $search: none stands alone"
# packets_per_second NAME GIVEN: 200000, 200k, 1.5M or 1G, in digits.
packets_per_second() {
    local factor
    if [[ ! $2 =~ ^([0-9]{1,10})(\.([0-9]{1,9}))?([kKMG]?)$ ]]; then
        die 2 "$1 $2: packets per second, such as 200000, 200k or 1.5M"
    fi
    case ${BASH_REMATCH[4]} in
    k | K) factor=3 ;;
    M) factor=6 ;;
    G) factor=9 ;;
    *) factor=0 ;;
    esac
    local whole=${BASH_REMATCH[1]} part=${BASH_REMATCH[3]}000000000
    if [[ ! ${part:factor} =~ ^0*$ ]]; then die 2 "$1 $2: a whole number of packets per second is possible"; fi
    # Leading zeros would make an octal number.
    printf '%s' $((10#$whole$(printf '%s' "${part:0:factor}")))
}
if [ -n "$rate" ]; then
    given=$rate
    rate=$(packets_per_second --rate "$given")
    [[ ${#rate} -le 10 && $rate -ge 1 && $rate -le 1000000000 ]] || die 2 "--rate $given: a number from 1 to 1G is possible"
fi
number --queues "$queues" 1 256
number --flows "$flows" 1 40000
number --repeat "$repeat" 1 1000
number -t "$threads" 1 1024 THREADS
number -f "$first_thread" 0 4095 F_THREAD
number -n "$count" 0 4000000000 COUNT
number -w "$delay" 0 1000000000 DELAY
number -p "$dst_port" 1 65535 DST_PORT
[[ $duration =~ ^[0-9]{0,7}\.?[0-9]{1,9}$ && $duration =~ [1-9] && $duration =~ ^[0-9]{0,7}(\.|$) && ! $duration =~ ^0*\.000 ]] ||
    die 2 "--duration $duration: seconds from 0.001 to 9999999, such as 1 or 0.5"
[[ $dev =~ ^[A-Za-z0-9_.-]{1,15}$ ]] ||
    die 2 "-i $dev: the name of a link has at most 15 letters, digits, points, hyphens and underscores"
[[ ! $dev =~ ^(\.|\.\.|lo|all|default)$ ]] || die 2 "-i $dev: the kernel uses this name itself; give another"
[ "$clone" = 0 ] || die 2 "-c $clone (SKB_CLONE): a veth hands each buffer on to its other end, so that it cannot be sent again; only 0 is possible"
[ "$burst" = 1 ] || die 2 "-b $burst (BURST): a veth takes no bursts from pktgen; only 1 is possible"
if [ -n "$pkt_size" ]; then
    [ -z "$sizes" ] || die 2 "-s and --sizes say the same thing; give one"
    number -s "$pkt_size" 60 1514 PKT_SIZE
    sizes=$((10#$pkt_size + 4))
fi
if [ $((10#$delay)) -ne 0 ]; then
    [ -z "$rate" ] || die 2 "-w and --rate say the same thing; give one"
    rate=$((1000000000 / 10#$delay))
fi
[ -n "$sizes" ] || sizes=$([ -n "$ip6" ] && echo 82,1518 || echo 64,1518)
least=$([ -n "$ip6" ] && echo 82 || echo 64)
for word in ${sizes//,/ }; do
    [[ $word = imix || ($word =~ ^[1-9][0-9]{1,3}$ && $word -ge $least && $word -le 1518) ]] ||
        die 2 "--sizes $word: imix, or bytes from $least to 1518"
done
if [ -n "$ip6" ] && [[ ,$sizes, == *,imix,* ]]; then die 2 "the imix has frames of 64 bytes, in which no IPv6 packet of ours finds room"; fi
if [ "$gen" = pktgen ] && [[ ,$sizes, == *,imix,* ]]; then die 2 "pktgen sends frames of one length, not the imix"; fi

# Addresses. The engine's side of a link ends in 1, the other in 2.
mac_gen=02:00:00:00:00:02 mac_dut=02:00:00:00:00:01 mac_tap=02:00:00:00:00:03 mac_out=02:00:00:00:01:01 mac_sink=02:00:00:00:01:02
if [ -n "$ip6" ]; then
    family=-6 here=fd00:18::1/64 peer=fd00:18::2 far=fd00:20::1/64 far_peer=fd00:20::2 net=fd00:19::/64
    source="[fd00:18::2]:20000" target="[${dest_ip:-fd00:19::2}]:$dst_port"
else
    family=-4 here=198.18.0.1/24 peer=198.18.0.2 far=198.18.1.1/24 far_peer=198.18.1.2 net=198.19.0.0/16
    source=198.18.0.2:20000 target=${dest_ip:-198.19.0.2}:$dst_port
fi
# Links of the script's own have these, and a router hands nothing on to what is no host.
if [ -n "$ip6" ]; then
    [[ -z $dest_ip || $dest_ip =~ ^[0-9a-fA-F]{1,4}:[0-9a-fA-F:]+$ ]] || die 2 "-d $dest_ip: an IPv6 address such as fd00:19::2"
    [[ ! ${dest_ip,,} =~ ^(ff|fe80:|fd00:18:|fd00:20:) ]] || die 2 "-d $dest_ip: not of fd00:18::/64 and fd00:20::/64, which the links have, nor of a group or link"
else
    byte='(0|[1-9][0-9]?|1[0-9][0-9]|2[0-4][0-9]|25[0-5])'
    [[ -z $dest_ip || $dest_ip =~ ^$byte(\.$byte){3}$ ]] || die 2 "-d $dest_ip: an IPv4 address such as 198.19.0.2"
    [[ ! $dest_ip =~ ^(0|127|22[4-9]|2[345][0-9])\. && ! $dest_ip =~ ^198\.18\.[01]\.(0|1|2|255)$ ]] ||
        die 2 "-d $dest_ip: neither an address of the links (198.18.0.1, .2, 198.18.1.1, .2), nor of a group or this host"
fi
[[ -z $dst_mac || $dst_mac =~ ^[0-9a-fA-F][02468aceACE](:[0-9a-fA-F]{2}){5}$ ]] ||
    die 2 "-m $dst_mac: a hardware address of one device, such as $mac_dut"
# A bridge hands on what is for somebody else; a router takes what is for itself, and gets this address.
[ -n "$dst_mac" ] || dst_mac=$([ "$topology" = bridge ] && echo $mac_tap || echo $mac_dut)

forwards=''
[[ ,$mode, != *,forward,* ]] || forwards=1

# Tells what it does, and does it unless nothing is to be done.
act() {
    if [ -n "$dry_run" ]; then echo "$*"; else "$@"; fi
}
setting() {
    local namespace=$1 name=$2 content=$3
    if [ -n "$dry_run" ]; then
        echo "${namespace:+ip netns exec $namespace }sysctl -w ${name//\//.}=$content"
    elif [ -e "/proc/sys/$name" ]; then
        if [ -n "$namespace" ]; then
            # /proc/sys/net is that of the process which opens the file.
            ip netns exec "$namespace" bash -c "echo $content > /proc/sys/$name"
        else
            echo "$content" >"/proc/sys/$name"
        fi
    fi
}

# quiet NAMESPACE [ROUTER]: a namespace that sends nothing on its own; a router forwards.
quiet() {
    local ns=$1
    # Else each link sends reports of its multicast groups.
    if [ -z "$ip6" ] || [ "$topology" = bridge ] || [ $# -eq 1 ]; then
        setting "$ns" net/ipv6/conf/default/disable_ipv6 1
    fi
    setting "$ns" net/ipv6/conf/default/accept_dad 0
    setting "$ns" net/ipv6/conf/default/dad_transmits 0
    setting "$ns" net/ipv6/conf/default/router_solicitations 0
    setting "$ns" net/ipv6/conf/default/addr_gen_mode 1
    # What a router reports of its groups goes at once, not within seconds, into a trial.
    setting "$ns" net/ipv6/conf/default/mldv1_unsolicited_report_interval 1
    setting "$ns" net/ipv6/conf/default/mldv2_unsolicited_report_interval 1
    setting "$ns" net/ipv4/conf/all/rp_filter 0
    setting "$ns" net/ipv4/conf/default/rp_filter 0
    setting "$ns" net/ipv4/ip_forward 1
    setting "$ns" net/ipv6/conf/all/forwarding 1
}

# side NAMESPACE LINK LINK_MAC DEVICE BRIDGE ADDRESS PEER PEER_MAC: one end of the engine and the link in front of it.
side() {
    local ns=$1 link=$2 link_mac=$3 device=$4 bridge=$5 address=$6 other=$7 other_mac=$8 kind=tun
    local in=(${ns:+-n "$ns"}) many=()
    [ "$topology" = route ] || kind=tap
    [ "$queues" -eq 1 ] || many=(multi_queue)
    act ip "${in[@]}" tuntap add dev "$device" mode "$kind" "${many[@]}"
    if [ "$topology" = bridge ]; then
        act ip "${in[@]}" link add "$bridge" type bridge stp_state 0 forward_delay 0 mcast_snooping 0
        act ip "${in[@]}" link set "$device" address "$([ "$device" = tun0 ] && echo $mac_tap || echo 02:00:00:00:01:03)"
        act ip "${in[@]}" link set "$link" master "$bridge"
        act ip "${in[@]}" link set "$device" master "$bridge"
        act ip "${in[@]}" link set "$link" up
        act ip "${in[@]}" link set "$device" up
        act ip "${in[@]}" link set "$bridge" up
        # Known from the start and never learned, so that nothing is flooded and no entry moves.
        act bridge "${in[@]}" link set dev "$link" learning off
        act bridge "${in[@]}" link set dev "$device" learning off
        act bridge "${in[@]}" fdb replace "$other_mac" dev "$link" master static
        if [ "$device" = tun0 ]; then
            act bridge "${in[@]}" fdb replace "$dst_mac" dev "$device" master static
        else
            act bridge "${in[@]}" fdb replace "$dst_mac" dev "$link" master static
            act bridge "${in[@]}" fdb replace "$mac_gen" dev "$device" master static
        fi
    else
        act ip "${in[@]}" link set "$link" address "$link_mac" up
        act ip "${in[@]}" link set "$device" up
        act ip "${in[@]}" "$family" address add "$address" dev "$link"
        act ip "${in[@]}" "$family" neigh replace "$other" lladdr "$other_mac" dev "$link" nud permanent
    fi
}

# cut_in_front NAMESPACE LINK: what is larger than the MTU is cut before it is on the link, and checksums are finished.
cut_in_front() {
    local namespace=$1 link=$2
    local command=(${namespace:+ip netns exec "$namespace"} ethtool -K "$link" tx off)
    if [ -n "$dry_run" ]; then echo "${command[*]}"; else "${command[@]}" >/dev/null; fi
}

topology() {
    act ip link set lo up
    quiet '' router
    act ip netns add gen
    quiet gen
    act ip link add dut0 type veth peer name "$dev" netns gen
    act ip -n gen link set "$dev" address $mac_gen up
    # Frames as on a wire: checksums finished, nothing larger than the MTU.
    cut_in_front gen "$dev"
    # What the engine merges, too, so that frames are counted where they arrive.
    [ "$offloads" = off ] || cut_in_front '' dut0
    side '' dut0 "$dst_mac" tun0 br0 "$here" "$peer" $mac_gen
    [ "$topology" = bridge ] || act ip "$family" route add "${dest_ip:-$net}" dev tun0
    [ -n "$forwards" ] || return 0
    act ip netns add out
    act ip netns add sink
    quiet out router
    quiet sink
    act ip link add out0 netns out type veth peer name sink0 netns sink
    act ip -n sink link set sink0 address $mac_sink up
    [ "$offloads" = off ] || cut_in_front out out0
    side out out0 $mac_out tun1 br1 "$far" "$far_peer" $mac_sink
    [ "$topology" = bridge ] || act ip -n out "$family" route add "${dest_ip:-$net}" via "$far_peer" dev out0
}

command_line() {
    echo "bench-scripts/pktgen.sh${words[*]+ ${words[*]}}"
}

# The engine's side of the work.
engine=("$target_dir/release/tun-driver" throughput --topology "$topology" --mode "$mode" --queues "$queues" --flows "$flows"
    --sizes "$sizes" --search "$search" --duration "$duration" --repeat "$repeat" --latency "$latency" --gen "$gen"
    --threads "$threads" --first-thread "$first_thread" --interface "$dev" --source "$source" --target "$target"
    --source-mac "$mac_gen" --target-mac "$dst_mac" --command "$(command_line)")
commit=$(git -C "$root" describe --always --dirty --abbrev=12 --exclude='*' 2>/dev/null || true)
[ -z "$commit" ] || engine+=(--commit "$commit")
[ -z "$backend" ] || engine+=(--backend "$backend")
[ "$offloads" = off ] || engine+=(--offloads "$offloads")
[ -z "$rate" ] || engine+=(--rate "$rate")
[ "$count" = 0 ] || engine+=(--count "$count")
[ -z "$append" ] || engine+=(--append)
[ -z "$verbose" ] || engine+=(--verbose)
[ -z "$json" ] || engine+=(--json)
out=${out:-$began_in/results/pktgen}
# Before anything is built or made.
place=$(readlink -m "$out")
while [ ! -e "$place" ]; do place=$(dirname "$place"); done
[ -d "$place" ] || die 2 "--out $out: $place is a file; name a folder"
[ -w "$place" ] || die 2 "--out $out: $place cannot be written to; name another folder"
engine+=(--out "$(readlink -m "$out")")

if [ -n "$dry_run" ]; then
    echo "unshare --net --mount --propagation private    # all below happens in there"
    echo "mount -t tmpfs none /run"
    echo "mkdir -p /run/netns"
    topology
    echo "${engine[*]}"
    [ ! -x "${engine[0]}" ] || "${engine[@]}" --dry-run
    exit 0
fi

# The second time, inside.
if [ -n "${TUN_DRIVER_OUTSIDE:-}" ]; then
    inside=$(readlink /proc/self/ns/net)
    # Nor is it that of whoever called, where that can be seen.
    outside=$(readlink "/proc/$PPID/ns/net" || true)
    [[ $inside != "$TUN_DRIVER_OUTSIDE" && $inside != "$outside" ]] || die 1 "this is no network namespace of its own; nothing was done"
    links=$(ip -o link show | grep -cv ': lo:' || true)
    [ "$links" = 0 ] || [ -z "$(ip -o link show type veth)" ] || die 1 "this network namespace is somebody's: it has links; nothing was done"
    # Names of namespaces live in a folder that nobody else sees.
    mount -t tmpfs none /run
    mkdir -p /run/netns
    # Addresses and IPv6 of links that are there already (of tunnels that the kernel makes by itself) do not disturb.
    topology
    code=0 interrupted=''
    # In the background, so that signals are dealt with at once. It dies with this shell, and with both the namespaces.
    "${engine[@]}" --parent $$ &
    running=$!
    trap 'interrupted=1; kill -TERM $running 2>/dev/null || true' INT TERM HUP
    while kill -0 $running 2>/dev/null; do wait $running && code=0 || code=$?; done
    if [ -n "$keep" ] && [ -z "$interrupted" ]; then
        # Else bash goes on reading after the signal.
        trap 'exit "$code"' INT TERM HUP
        echo "kept: nsenter --net --mount --target $$ leads in; Ctrl-C or the end of standard input ends it" >&2
        read -r _ || true
    fi
    exit "$code"
fi

# need PROGRAM PACKAGE
missing=()
need() {
    command -v "$1" >/dev/null || missing+=("$2")
}
need ip iproute2
need bridge iproute2
need ethtool ethtool
need unshare util-linux
need mount mount
[ -n "${TUN_DRIVER_NO_BUILD:-}" ] || need cc gcc
if [ ${#missing[@]} -gt 0 ]; then
    mapfile -t missing < <(printf '%s\n' "${missing[@]}" | sort -u)
    line="apt-get update && apt-get install -y --no-install-recommends ${missing[*]}"
    if [ -n "$install" ]; then
        [ "$(id -u)" -eq 0 ] || die 77 "--install wants root: $line"
        apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "${missing[@]}"
    else
        die 77 "missing: ${missing[*]}. Install them with: $line    (or give --install)"
    fi
fi
command -v cargo >/dev/null || [ -x "${engine[0]}" ] || die 77 "missing: Rust (cargo)"
[ -c /dev/net/tun ] || die 77 "there is no /dev/net/tun: modprobe tun"
[[ -r /dev/net/tun && -w /dev/net/tun ]] || die 77 "/dev/net/tun cannot be opened by this user: run as root, or chmod 666 /dev/net/tun"

# Not inside, where there is no network.
if command -v cargo >/dev/null && [ -z "${TUN_DRIVER_NO_BUILD:-}" ]; then
    (cd "$root" && cargo build --quiet --release --features cli --bin tun-driver --target-dir "$target_dir")
fi
if [ "$gen" != builtin ] && [ "$(id -u)" -eq 0 ] && [ ! -e /proc/net/pktgen ]; then
    # Not every kernel has it; the tool says which generator it took.
    modprobe --quiet pktgen 2>/dev/null || true
fi
mode_of_entry=(--net --mount --propagation private)
[ "$(id -u)" -eq 0 ] || mode_of_entry+=(--user --map-root-user)
# One process from here on, so that signals reach it.
TUN_DRIVER_OUTSIDE=$(readlink /proc/self/ns/net)
export TUN_DRIVER_OUTSIDE
exec unshare "${mode_of_entry[@]}" -- "$self" "${words[@]+"${words[@]}"}"
