# What came of a test file: from $name, $code (of its exit), $seconds, $output, $errors and $complaints (of the kernel).
($output | split("\n")) as $lines
| ([$lines[] | capture("^test result: .*?(?<ok>[0-9]+) passed; (?<failed>[0-9]+) failed")] | last) as $result
| { what: "file", name: $name, code: $code, seconds: $seconds, ok: ($result.ok // "0" | tonumber),
    failed: [$lines[] | capture("^test (?<name>.*?) +\\.\\.\\. FAILED") | .name],
    ignored: [$lines[] | capture("^test (?<name>.*?) +\\.\\.\\. ignored[ ,:(]*(?<why>.*?)\\)?$")],
    unfinished: (if $result != null then [] else
        [$errors | split("\n")[] | capture("^running: (?<name>.*)") | .name] - [$lines[] | capture("^test (?<name>.*?) +\\.\\.\\. .") | .name] end),
    complaints: ($complaints | split("\n") | map(select(. != ""))),
    why: (if $code == 137 or $code == 124 then "did not end in time" elif $result == null then "ended without a result, exit code \($code)" else "exit code \($code)" end) }
| .passed = (.code == 0 and $result != null and .failed == [] and .complaints == [])
