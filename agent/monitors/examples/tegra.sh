#!/bin/sh
# A Jetson: memory (MiB) and GPU (%) in use as tegrastats says; temperatures (C), an error at the config's Limit.
. "${0%/*}/monitor.sh"

Tegrastats() {
    line=$(tegrastats --interval 500 | head -n 1)
    memory=$(printf %s "$line" | sed -n 's/.*RAM \([0-9]*\)\/.*/\1/p')
    gpu=$(printf %s "$line" | sed -n 's/.*GR3D_FREQ \([0-9]*\)%.*/\1/p')
    [ -n "$memory" ] || fail "tegrastats: ${line:-it says nothing}"
    meta memory "$memory"
    [ -z "$gpu" ] || meta gpu "$gpu"
}

Thermal() {
    limit=$(config Limit 95) bad=
    for zone in "${SYS:-/sys}"/class/thermal/thermal_zone*; do
        { read -r kind <"$zone/type" && read -r millis <"$zone/temp"; } 2>/dev/null || continue # one that is off
        meta "$(printf %s "$kind" | tr -c 'A-Za-z0-9' _)" "$((millis / 1000))"
        [ "$((millis / 1000))" -lt "$limit" ] || bad="$bad $kind has $((millis / 1000)) C;"
    done
    [ -z "$bad" ] || fail "${bad# }"
}

serve
