#!/usr/bin/env bats
# What a CI job shows of a run, also of one that failed half-way.

setup() {
    dir=$BATS_TEST_TMPDIR/artifacts
    mkdir -p "$dir/pktgen"
    printf 'tests         FAILED      12 s\n' >"$dir/steps.txt"
}

summary() {
    run "$BATS_TEST_DIRNAME/summary" "$dir"
    [ "$status" -eq 0 ]
    [[ $output == *"tests         FAILED"* ]]
}

@test "a run without throughput still shows its steps" {
    summary
    [[ $output == *"No throughput"* ]]
}

@test "a throughput report that was cut off is left out, and the steps are shown" {
    printf '{"rates": [' >"$dir/pktgen/throughput.json"
    summary
    [[ $output == *"No throughput"* ]]
    [ ! -e "$dir/trend-rates.json" ]
}

@test "a run without any file gives a summary" {
    rm -r "$dir/pktgen" "$dir/steps.txt"
    run "$BATS_TEST_DIRNAME/summary" "$dir"
    [ "$status" -eq 0 ]
    [[ $output == *"No throughput"* ]]
}

@test "a complete report gives tables and the trend" {
    cat >"$dir/pktgen/throughput.json" <<'END'
{"generator": "builtin", "trials": 3, "offered_packets": 10, "unexplained_packets": 0,
 "rates": [{"mode": "echo", "frame": "64", "what": "MRR", "rate_pps": {"median": 1000, "min": 900, "max": 1100},
            "trial": {"loss_percent": 0.1, "engine_cpu_ns_per_packet": 500}}],
 "latencies": [{"mode": "echo", "load_percent": 10, "wait": "block",
                "trial": {"latency": {"p50_ns": 1, "p99_ns": 2, "p99_9_ns": 3}}}]}
END
    summary
    [[ $output == *"| echo | 64 | MRR | 1 |"* ]]
    [ "$(jq 'length' "$dir/trend-rates.json")" -eq 1 ]
    [ "$(jq 'length' "$dir/trend-times.json")" -eq 2 ]
}
