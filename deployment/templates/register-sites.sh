#!/bin/sh
# Tells the running SuperLink which public keys may join: every keys/NAME.pub that it has not yet.
# The number by which the SuperLink calls a site is kept in keys/NAME.node.
set -eu
here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)
. "$here/environment.sh"
for key in "$here"/keys/*.pub; do
    [ -e "$key" ] || { echo "there is no public key in $here/keys" >&2; exit 1; }
    name=$(basename -- "$key" .pub)
    if answer=$(flwr supernode register "$key" @LINK@ --name "$name" 2>&1); then
        node=$(printf '%s' "$answer" | sed -n 's/.*SuperNode \([0-9]*\) registered.*/\1/p')
        echo "$node" > "$here/keys/$name.node"
        echo "$name: registered as node $node"
    elif printf '%s' "$answer" | grep -q "already in use"; then
        echo "$name: registered before"
    else
        printf '%s\n' "$answer" >&2
        exit 1
    fi
done
