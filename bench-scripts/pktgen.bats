#!/usr/bin/env bats
# What bench-scripts/pktgen.sh promises: options, dry run, errors, clean-up. The runs themselves need root and /dev/net/tun.

setup() {
    script="$BATS_TEST_DIRNAME/pktgen.sh"
    host=$(readlink /proc/self/ns/net)
    out=$(mktemp -d)
    unset DEV PKT_SIZE DEST_IP DST_MAC DST_PORT THREADS F_THREAD SKB_CLONE COUNT BURST DELAY IP6 VERBOSE DEBUG APPEND OFFLOADS
}

teardown() {
    rm -rf "$out"
}

need_root() {
    if [ "$(id -u)" -ne 0 ] || [ ! -c /dev/net/tun ]; then
        [ -z "${TUN_DRIVER_REQUIRE_ALL:-}" ] || { echo "root and /dev/net/tun are required here" && return 1; }
        skip "wants root and /dev/net/tun"
    fi
}

links() {
    ip -o link show | sed 's/^[0-9]*: //; s/[@:].*//' | sort
}

all_ended() { # SESSION: within ten seconds nothing of it runs any more
    for _ in {1..100}; do
        pgrep -s "$1" >/dev/null || return 0
        sleep 0.1
    done
    ps -s "$1" -o pid,args
    return 1
}

refused() { # CODE WORD OPTIONS…: it ends so, says so, and does nothing
    local code=$1 word=$2
    shift 2
    run "$script" "$@" --dry-run
    [ "$status" -eq "$code" ]
    [[ $output == *"$word"* ]]
    [[ $output != *unshare* ]]
}

@test "-h tells every option" {
    run "$script" -h
    [ "$status" -eq 0 ]
    for option in -i -s -d -m -p -t -f -c -n -b -w -6 -v -x -a --gen --topology --mode --backend --offloads --queues --flows --sizes --rate --search \
        --duration --repeat --json --out --dry-run --keep --install; do
        [[ $output == *"$option"* ]] || { echo "$option is not told"; return 1; }
    done
}

@test "wrong values end with code 2 and a word about them" {
    refused 2 "no such option" --nonsense
    refused 2 "wants a value" --mode
    refused 2 "--gen trafgen" --gen trafgen
    refused 2 "--topology ring" --topology ring
    refused 2 "--mode fly" --mode recv,fly
    refused 2 "--backend dpdk" --backend dpdk
    refused 2 "--offloads some" --offloads some
    refused 2 "--queues 0" --queues 0
    refused 2 "--queues many" --queues many
    refused 2 "--flows 50000" --flows 50000
    refused 2 "--sizes 63" --sizes 63
    refused 2 "--sizes 1519" --sizes 64,1519
    refused 2 "--sizes 64" -6 --sizes 64
    refused 2 "--search fast" --search fast
    refused 2 "--duration soon" --duration soon
    refused 2 "-c 4" -c 4
    refused 2 "-b 8" -b 8
    refused 2 "-s 1515" -s 1515
    refused 2 "-i " -i "too/long;name"
    refused 2 "give one" -s 60 --sizes 64
    refused 2 "give one" -w 1000 --rate 1000
    refused 2 "imix" --gen pktgen --sizes imix
    refused 2 "imix" -6 --sizes imix
    refused 2 "--duration 0" --duration 0
    refused 2 "--mode ," --mode ,
    refused 2 "--sizes 64," --sizes 64,
    refused 2 "-d nowhere" -d nowhere
    refused 2 "-d fd00:19::2" -d fd00:19::2
    refused 2 "-d 198.19.0.2" -6 -d 198.19.0.2
    refused 2 "-d 198.18.0.1" -d 198.18.0.1
    refused 2 "-d 224.0.0.1" -d 224.0.0.1
    refused 2 "-m zz" -m zz
    refused 2 "--rate wants a value" --rate ""
    refused 2 "--rate 0" --rate 0
    refused 2 "--rate -1" --rate -1
    refused 2 "--rate 1e6" --rate 1e6
    refused 2 "--rate 2.5" --rate 2.5
    refused 2 "--rate 9999999999G" --rate 9999999999G
    refused 2 "--mode *" --mode "*"
    refused 2 "recv is given twice" --mode recv,recv-many,recv
    refused 2 "--mode recv echo" --mode "recv echo"
    refused 2 "64 is given twice" --sizes 64,64
    refused 2 "imix, or bytes" --sizes 0064
    refused 2 "--sizes -64" --sizes -64
    refused 2 "none stands alone" --search none,ndr
    refused 2 "--json takes no value" --json=1
    refused 2 "--duration 99999999" --duration 99999999
    refused 2 "--duration 0.0001" --duration 0.0001
    refused 2 "-i .." -i ..
    refused 2 "-i lo" -i lo
    DELAY=soon refused 2 "-w soon (DELAY)"
    touch "$out/file"
    refused 2 "$out/file is a file; name a folder" --out "$out/file"
    refused 2 "$out/file is a file; name a folder" --out "$out/file/in/it"
    refused 2 "-m 01:00:5e:00:00:01" -m 01:00:5e:00:00:01
}

@test "a dry run prints each command and does none" {
    before=$(links)
    run "$script" --dry-run --mode forward --gen pktgen
    [ "$status" -eq 0 ]
    for line in "unshare --net --mount" "ip netns add gen" "ip link add dut0 type veth peer name gen0 netns gen" \
        "ip tuntap add dev tun0 mode tun" "ip -4 route add 198.19.0.0/16 dev tun0" "ip -n out tuntap add dev tun1 mode tun" "throughput"; do
        [[ $output == *"$line"* ]] || { echo "missing: $line"; return 1; }
    done
    [ "$(links)" = "$before" ]
    [ ! -e /run/netns/gen ]
}

@test "letters and environment variables mean the same" {
    letters=$("$script" --dry-run -i g1 -s 508 -d 198.19.7.7 -m 02:00:00:00:00:09 -p 77 -t 2 -f 1 -n 500 -w 2000 | grep -v -- --command)
    variables=$(DEV=g1 PKT_SIZE=508 DEST_IP=198.19.7.7 DST_MAC=02:00:00:00:00:09 DST_PORT=77 THREADS=2 F_THREAD=1 COUNT=500 DELAY=2000 \
        "$script" --dry-run | grep -v -- --command)
    [ "$letters" = "$variables" ]
    run "$script" --dry-run -i g1 -s508 -p 77 -n 500 -w 2000
    [[ $output == *"--sizes 512"* && $output == *"--rate 500000"* && $output == *"--count 500"* && $output == *"--interface g1"* ]]
    [[ $output == *"198.19.0.2:77"* ]]
}

@test "offloads are off unless asked for, by option or environment" {
    run "$script" --dry-run
    [[ $output != *--offloads* && $output != *"ethtool -K dut0 tx off"* ]]
    option=$("$script" --dry-run --mode forward --offloads on | grep -v -- --command)
    variable=$(OFFLOADS=on "$script" --dry-run --mode forward | grep -v -- --command)
    [ "$option" = "$variable" ]
    run "$script" --dry-run --mode forward --offloads on
    [ "$status" -eq 0 ]
    [[ $output == *"throughput"*"--offloads on"* ]]
    [[ $output == *"ethtool -K dut0 tx off"* && $output == *"ip netns exec out ethtool -K out0 tx off"* ]]
}

@test "a bridge has a TAP, and two queues are asked for" {
    run "$script" --dry-run --topology bridge --queues 2
    [ "$status" -eq 0 ]
    [[ $output == *"ip tuntap add dev tun0 mode tap multi_queue"* && $output == *"link add br0 type bridge"* ]]
}

@test "rates take k, M and G" {
    for pair in 08:8 100k:100000 1.5M:1500000 0.5K:500 1G:1000000000; do
        run "$script" --dry-run --rate "${pair%:*}"
        [ "$status" -eq 0 ]
        [[ $output == *"--rate ${pair#*:} "* ]] || { echo "$pair: $output"; return 1; }
    done
}

@test "a switch variable of 0 is off" {
    run env IP6=0 VERBOSE=0 DEBUG=0 APPEND=0 "$script" --dry-run
    [ "$status" -eq 0 ]
    [[ $output != *fd00* && $output != *--verbose* && $output != *--append* ]]
}

@test "letters may stand together" {
    run "$script" -6v --dry-run
    [ "$status" -eq 0 ]
    [[ $output == *"fd00:19::/64"* && $output == *"--verbose"* ]]
}

@test "a missing tool is told with the line that installs it, and nothing is installed" {
    mkdir "$out/bin"
    for tool in bash readlink dirname cat id mktemp sort printf; do
        ln -s "$(command -v $tool)" "$out/bin/$tool"
    done
    # It looks into the folders of system administrators by itself, which here have what is to be missing.
    mkdir "$out/bench-scripts"
    sed '/^PATH=/d' "$script" >"$out/bench-scripts/pktgen.sh"
    PATH="$out/bin" run bash "$out/bench-scripts/pktgen.sh"
    [ "$status" -eq 77 ]
    [[ $output == *"apt-get update && apt-get install -y --no-install-recommends"*ethtool*iproute2* ]]
}

@test "inside somebody's namespace it refuses" {
    need_root
    TUN_DRIVER_OUTSIDE=$host run "$script"
    [ "$status" -eq 1 ]
    [[ $output == *"nothing was done"* ]]
}

@test "the tool refuses to send out of what is no veth" {
    need_root
    run unshare --net -- sh -c "ip link add d0 type bridge && '$BATS_TEST_DIRNAME/../target/release/tun-driver' throughput --gen builtin \
        --gen-netns /proc/self/ns/net --interface d0 --out '$out'"
    [ "$status" -eq 2 ]
    [[ $output == *"veth only"* ]]
}

@test "a run balances its books, writes its files, and leaves nothing behind" {
    need_root
    before=$(links)
    run "$script" --gen builtin --mode recv-many,echo --sizes 64 --search pdr --duration 0.3 --repeat 1 --json --out "$out"
    [ "$status" -eq 0 ]
    [ "$(links)" = "$before" ]
    [ ! -e /run/netns/gen ]
    grep -q '"unexplained_packets": 0' "$out/throughput.json"
    grep -q '"generator": "builtin"' "$out/throughput.json"
    for file in throughput.md throughput.html latency-echo-64B-block-50pct-all.hgrm latency-echo-64B-block-50pct.hlog \
        latency-echo-64B-spin-90pct-q0.hgrm; do
        [ -s "$out/$file" ] || { echo "missing: $file"; return 1; }
    done
}

@test "any target address and hardware address will do" {
    need_root
    for options in "-d 198.18.0.42" "-d 10.1.2.3 -m 02:00:00:00:00:09" "-6 -d 2001:db8::5"; do
        # shellcheck disable=SC2086 # several words
        run "$script" --gen builtin --mode recv-many,echo,forward --rate 2000 --sizes 128 --duration 0.2 --repeat 1 --no-latency --json --out "$out" $options
        [ "$status" -eq 0 ] || { echo "$options: $output"; return 1; }
        jq -e '.incomplete == null and .unexplained_packets == 0 and ([.rates[].trial.received_packets] == [400, 400, 400])' "$out/throughput.json"
    done
}

@test "ctrl-C ends a long trial at once" {
    need_root
    for mode in recv-many send-many; do
        setsid "$script" --gen builtin --mode $mode --rate 1000 --duration 60 --out "$out" >"$out/log" 2>&1 &
        run_id=$!
        sleep 3
        begin=$SECONDS
        kill -TERM "$run_id"
        code=0
        wait "$run_id" || code=$?
        [ "$code" -eq 130 ] && [ $((SECONDS - begin)) -lt 20 ] || { cat "$out/log"; return 1; }
    done
}

@test "--keep keeps the namespaces until it is told to end" {
    need_root
    mkfifo "$out/input"
    sleep 60 >"$out/input" &
    writer=$!
    setsid "$script" --gen builtin --mode recv-many --rate 1000 --sizes 64 --duration 0.2 --repeat 1 --no-latency --keep --out "$out" \
        <"$out/input" >"$out/log" 2>&1 &
    run_id=$!
    for _ in {1..100}; do
        grep -q '^kept: ' "$out/log" && break
        sleep 0.2
    done
    nsenter --net --target "$run_id" ip link show tun0
    begin=$SECONDS
    kill -TERM "$run_id"
    code=0
    wait "$run_id" || code=$?
    kill "$writer"
    [ "$code" -eq 0 ] && [ $((SECONDS - begin)) -lt 20 ]
    all_ended "$run_id"
}

@test "a run with offloads balances its books" {
    need_root
    run "$script" --gen builtin --mode recv-many,send-many,echo --sizes 64 --search none --duration 0.3 --repeat 1 --no-latency --offloads on \
        --json --out "$out"
    [ "$status" -eq 0 ]
    grep -q '"unexplained_packets": 0' "$out/throughput.json"
    grep -q '"offloads": true' "$out/throughput.json"
}

@test "ctrl-C ends a run, with the report so far and nothing left behind" {
    need_root
    before=$(links)
    setsid "$script" --gen builtin --duration 2 --out "$out" >"$out/log" 2>&1 &
    run_id=$!
    sleep 4
    kill -INT -- "-$run_id"
    code=0
    wait "$run_id" || code=$?
    [ "$code" -eq 130 ] || { cat "$out/log"; return 1; }
    jq -e '.incomplete == "interrupted"' "$out/throughput.json"
    grep -q "INCOMPLETE: interrupted" "$out/throughput.md"
    grep -q "INCOMPLETE: interrupted" "$out/throughput.html"
    [ "$(links)" = "$before" ]
    all_ended "$run_id"
}

@test "kill -9 of the script ends the tool, and with it the namespaces and devices" {
    need_root
    before=$(links)
    # Early, while the tool starts, and in the middle of a trial.
    for moment in starts measures; do
        setsid "$script" --gen builtin --mode echo --rate 1000 --duration 60 --out "$out" >"$out/log" 2>&1 &
        run_id=$!
        tool=''
        for _ in {1..300}; do
            tool=$(pgrep -s "$run_id" -x tun-driver || true)
            [ -z "$tool" ] || break
            sleep 0.1
        done
        [ -n "$tool" ]
        [ $moment = starts ] || sleep 2
        kill -KILL "$run_id"
        wait "$run_id" || true
        all_ended "$run_id"
        [ "$(links)" = "$before" ]
        [ ! -e /run/netns/gen ]
    done
}

@test "the tool does not start for a parent that has ended" {
    need_root
    run "$BATS_TEST_DIRNAME/../target/release/tun-driver" throughput --parent 1 --out "$out"
    [ "$status" -eq 1 ]
    [[ $output == *"process 1 did not start this one, or has ended"* ]]
}

@test "ctrl-C at any moment leaves no namespace, device or process" {
    need_root
    before=$(links)
    # While links are made, the tool starts, the maximum is measured, a rate is searched for, latencies are taken.
    for moment in 0.02 0.1 0.2 0.4 0.8 1.5 3 6; do
        # A shell that is started in the background is deaf to SIGINT otherwise.
        env --default-signal=INT setsid "$script" --gen builtin --mode forward,recv-many --sizes 64 --duration 1 --repeat 9 \
            --out "$out" >"$out/log" 2>&1 &
        run_id=$!
        sleep $moment
        begin=$SECONDS
        kill -INT -- "-$run_id" || true
        wait "$run_id" || true
        [ $((SECONDS - begin)) -lt 20 ] || { echo "after $moment s"; cat "$out/log"; return 1; }
        all_ended "$run_id" || { echo "after $moment s"; return 1; }
        [ "$(links)" = "$before" ]
        [ ! -e /run/netns/gen ]
    done
}
