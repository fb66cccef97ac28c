#!/bin/sh
# The board's management controller, by ipmitool: is its event log nearly full, is a sensor critical?
. "${0%/*}/monitor.sh"

Sel() {
    info=$(ipmitool sel info) || fail "ipmitool: $info"
    used=$(printf '%s\n' "$info" | sed -n 's/^Percent Used *: *\([0-9]*\).*/\1/p')
    meta entries "$(printf '%s\n' "$info" | sed -n 's/^Entries *: *\([0-9]*\).*/\1/p')"
    meta used "${used:-unknown}"
    [ "${used:-0}" -lt "$(config Full 90)" ] || fail "the event log is $used % full; save it, then: ipmitool sel clear"
}

Sensors() {
    list=$(ipmitool sdr list) || fail "ipmitool: $list"
    meta sensors "$(printf '%s\n' "$list" | grep -c '|')"
    # The third column: ok, ns (no reading), nc (not critical), cr (critical), nr (not recoverable).
    bad=$(printf '%s\n' "$list" | awk -F' *[|] *' '$3 == "cr" || $3 == "nr" { printf "%s%s is %s", sep, $1, $2; sep = "; " }')
    [ -z "$bad" ] || fail "$bad"
}

serve
