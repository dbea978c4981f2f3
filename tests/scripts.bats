#!/usr/bin/env bats
# What the scripts of tests/ promise before and beside what they run: exit codes, and that nothing outlives them.

setup() {
    here=$BATS_TEST_DIRNAME
    out=$(mktemp -d)
    : >"$out/file"
    # In the place of cargo: it starts a process that outlives a signal to cargo alone, and says which.
    mkdir "$out/bin"
    cat >"$out/bin/cargo" <<'END'
#!/usr/bin/env bash
case $* in
metadata*) echo "{\"target_directory\": \"$STUB_OUT/target\"}" ;;
*--version*) exit 1 ;;
*)
    sleep 300 &
    echo $! >"$STUB_OUT/started.new"
    mv "$STUB_OUT/started.new" "$STUB_OUT/started"
    wait
    ;;
esac
END
    printf '#!/usr/bin/env bash\necho "host: stub"\n' >"$out/bin/rustc"
    chmod +x "$out/bin/cargo" "$out/bin/rustc"
    mkdir -p "$out/target"
}

teardown() {
    [ ! -f "$out/started" ] || kill "$(cat "$out/started")" 2>/dev/null || true
    rm -rf "$out"
}

refused() { # WORD SCRIPT OPTIONS…: exit code 2 and a word about it, and nothing is built
    local word=$1 script=$2
    shift 2
    # A bound of the test's own, should it begin to build.
    PATH=$out/bin:$PATH STUB_OUT=$out run timeout 20 "$here/$script" "$@"
    [ "$status" -eq 2 ] || { echo "$script $*: $status: $output"; return 1; }
    [[ $output == *"$word"* ]] || { echo "$script $*: $output"; return 1; }
    [ ! -e "$out/started" ]
}

ended_by() { # SIGNAL SCRIPT OPTIONS…: it ends within 20 seconds of the signal to it alone, and so does what it started
    local signal=$1 script=$2 code=0 _
    shift 2
    rm -f "$out/started"
    PATH=$out/bin:$PATH STUB_OUT=$out env --default-signal=INT "$here/$script" "$@" >"$out/log" 2>&1 3>&- &
    local pid=$!
    for _ in {1..200}; do
        [ ! -s "$out/started" ] || break
        sleep 0.1
    done
    [ -s "$out/started" ] || { cat "$out/log"; kill -KILL "$pid"; return 1; }
    kill "-$signal" "$pid"
    for _ in {1..200}; do
        kill -0 "$pid" 2>/dev/null || break
        sleep 0.1
    done
    ! kill -0 "$pid" 2>/dev/null || { echo "$script goes on after $signal"; kill -KILL "$pid"; return 1; }
    wait "$pid" || code=$?
    [ "$code" -eq 130 ] || { echo "$script: $code"; cat "$out/log"; return 1; }
    ! kill -0 "$(cat "$out/started")" 2>/dev/null || { echo "what $script started goes on"; return 1; }
}

@test "a run of nothing is refused" {
    refused "--only needs a value" long/run --only ""
    refused "--only" long/run --only ,
    refused "--only bogus" long/run --only bogus
    refused "--share 0.0000" long/run --share 0.0000
    refused "--share .0" long/run --share .0
    refused "--test bogus" long/run --only faults --test bogus
}

@test "a file as the folder for results is refused" {
    for script in long/run rootless/run kernels/run; do
        refused "$out/file is a file; name a folder" $script --out "$out/file"
        refused "$out/file is a file; name a folder" $script --out "$out/file/below"
        refused "--out needs a value" $script --out ""
    done
}

@test "words that are not understood are refused" {
    refused "--short is given alone" asan/run --short extra
    refused "--short is given alone" asan/run lib --short
    refused "bogus: no file of tests/" asan/run bogus
    refused "--nonsense: no such option" asan/run --nonsense
    refused "usage: " loom/run 99999999999999999999999
    refused "usage: " loom/run 3 model surplus
    refused "usage: " loom/run 0
    refused "no test file bogus" rootless/run --test bogus
    refused "no test file bogus" kernels/run --test bogus
}

@test "a signal ends what was started, too" {
    for signal in INT TERM; do
        ended_by $signal asan/run lib
        ended_by $signal long/run --only asan --out "$out/long"
        ended_by $signal long/run --only faults --out "$out/long"
    done
}

@test "a signal ends what the run without rights started, too" {
    if [ "$(id -u)" -ne 0 ] || [ ! -c /dev/net/tun ]; then
        [ -z "${TUN_DRIVER_REQUIRE_ALL:-}" ] || { echo "root and /dev/net/tun are required here" && return 1; }
        skip "wants root and /dev/net/tun"
    fi
    for signal in INT TERM; do
        ended_by $signal rootless/run --test cases --out "$out/rootless"
    done
}

@test "a signal ends the tests that run, too" {
    # The long run's test files, and CI's steps, are processes beside the script.
    cp "$out/bin/cargo" "$out/program"
    cat >"$out/bin/cargo" <<END
#!/usr/bin/env bash
echo '{"executable": "$out/program", "profile": {"test": true}, "target": {"kind": ["test"], "name": "stub"}}'
END
    for signal in INT TERM; do
        ended_by $signal long/run --only faults --out "$out/long"
    done
}
