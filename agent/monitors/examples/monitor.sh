# What a monitor in POSIX sh needs; the script that includes it has a function for each of its steps, by its name.
#
#     . "${0%/*}/monitor.sh"
#     Ping() { meta reply "$(ping_it)" || fail "no reply"; }
#     serve
#
# A step is an error if its function ends with another code than 0; what it wrote is the text then. `meta` tells a
# number or word with a good result. `config KEY DEFAULT` is a setting of the monitor's config table.

said='' config='{}' pairs=''

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

# A value that could be read as hex is one: so each is written in it.
meta() {
    pairs="${pairs:+$pairs,}$1=$(printf %s "$2" | od -An -v -tx1 | tr -d ' \n')"
}

fail() {
    printf '%s' "$1"
    exit 1
}

config() {
    value=$(printf %s "$config" | sed -n "s/.*\"$1\": *\"\{0,1\}\([^\",}]*\).*/\1/p")
    printf %s "${value:-$2}"
}

# In a shell of its own, so that whatever it does ends with it. Its last line is what `meta` gathered.
run_step() {
    result=$(
        trap 'printf "\n%s." "$pairs"' EXIT
        "$1" 2>&1
    )
    code=$?
    found=${result##*
}
    found=${found%.} text=${result%
*}
    if [ "$code" -eq 0 ]; then
        say "Step OK${found:+ $found}"
    else
        say "Step Error ${found:+$found }${text:-it ended with code $code}"
    fi
}

serve() {
    say "Started 1.1"
    hear # Version
    say "Ready"
    hear
    config=${said#Config }
    say "Configured"
    while :; do
        hear
        case $said in
        "Run Step "*) run_step "${said#Run Step }" ;;
        Exit*) exit 0 ;;
        esac
    done
}
