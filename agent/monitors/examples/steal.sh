#!/bin/sh
# A virtual machine: how much of the time (%) the host gave to others while we wanted it, in the config's Seconds.
. "${0%/*}/monitor.sh"

# All ticks, and the stolen ones: user nice system idle iowait irq softirq steal.
ticks() {
    read -r _ user nice system idle wait irq soft steal _ <"${PROC:-/proc}/stat"
    echo $((user + nice + system + idle + wait + irq + soft + steal)) "$steal"
}

Steal() {
    before=$(ticks)
    sleep "$(config Seconds 5)"
    after=$(ticks)
    all=$((${after% *} - ${before% *}))
    percent=$((all > 0 ? 100 * (${after#* } - ${before#* }) / all : 0))
    meta steal "$percent"
    [ "$percent" -lt "$(config Limit 10)" ] || fail "the host took $percent % of the time"
}

serve
