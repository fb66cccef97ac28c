#!/bin/sh
# Each NVIDIA GPU: temperature (C), use (%), memory (MiB); an error for throttling by hardware and for memory faults.
. "${0%/*}/monitor.sh"

Gpus() {
    fields=index,temperature.gpu,utilization.gpu,memory.used,clocks_throttle_reasons.hw_slowdown,ecc.errors.uncorrected.volatile.total
    gpus=$(nvidia-smi --query-gpu="$fields" --format=csv,noheader,nounits) || fail "nvidia-smi: $gpus"
    [ -n "$gpus" ] || fail "nvidia-smi lists no GPU"
    bad=
    while IFS=, read -r n temp use memory slow ecc; do
        meta "temp$n" "$temp"
        meta "use$n" "$use"
        meta "memory$n" "$memory"
        [ "$slow" != Active ] || bad="$bad GPU $n is slowed down by its hardware at $temp C;"
        case $ecc in
        '' | 0 | *[!0-9]*) ;; # no ECC: [N/A]
        *) bad="$bad GPU $n has $ecc uncorrected memory errors;" ;;
        esac
    done <<EOF
$(printf '%s\n' "$gpus" | sed 's/, */,/g')
EOF
    [ -z "$bad" ] || fail "${bad# }"
}

serve
