#!/bin/sh
# The demo's smallest test: exit code 0 is passed.
set -eu
for n in 1 2 3 4 5; do
    echo "$n + $n = $((n + n))"
    [ $((n + n)) -eq $((2 * n)) ]
done
