#!/bin/sh
# A monitor in POSIX sh. A message is five digits, a space, and that many bytes; dd reads exactly so many.
# Understands both spellings of the protocol: "Run Step X" and the older "Run step X".
set -u

say() { # length in bytes, not characters
    printf '%05d %s' "$(printf %s "$1" | wc -c)" "$1"
}

hear() {
    length=$(dd bs=1 count=6 2>/dev/null)
    [ -n "$length" ] || exit 1 # stdin has ended
    length=${length% }
    while [ "${length#0}" != "$length" ]; do length=${length#0}; done
    said=$(dd bs=1 count="${length:-0}" 2>/dev/null)
}

say "Started 1.1"
hear # Version
say "Ready"
hear
config=${said#Config }
say "Configured"
while :; do
    hear
    case $said in
    "Run Step Greet" | "Run step Greet")
        say "Log Info Hello, my configuration is $config"
        say "Step OK"
        ;;
    "Run Step "* | "Run step "*) say "Step Error there is no step ${said#Run ?tep }" ;;
    Exit*) exit 0 ;;
    esac
done
