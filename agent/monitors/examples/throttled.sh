#!/bin/sh
# A Raspberry Pi: is the voltage too low, or is it throttled now? Temperature in C.
. "${0%/*}/monitor.sh"

Throttled() {
    file=${SYS:-/sys}/devices/platform/soc/soc:firmware/get_throttled
    if [ -r "$file" ]; then
        read -r bits <"$file"
        bits=0x${bits#0x}
    else
        bits=$(vcgencmd get_throttled) || fail "vcgencmd: $bits"
        bits=${bits#throttled=}
    fi
    meta throttled "$bits"
    zone=${SYS:-/sys}/class/thermal/thermal_zone0/temp
    if [ -r "$zone" ]; then
        read -r millis <"$zone"
        meta temp "$((millis / 1000))"
    fi
    bad=
    [ $((bits & 1)) -eq 0 ] || bad="$bad under-voltage;"
    [ $((bits & 2)) -eq 0 ] || bad="$bad frequency capped;"
    [ $((bits & 4)) -eq 0 ] || bad="$bad throttled;"
    [ $((bits & 8)) -eq 0 ] || bad="$bad soft temperature limit;"
    [ -z "$bad" ] || fail "now:${bad%;}"
}

serve
