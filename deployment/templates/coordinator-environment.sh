# For the scripts beside it, which set `here` to this folder, wherever it was moved to.
# Bouquet and Flower are looked for in BOUQUET_BIN, then in PATH.
FLWR_HOME="$here/flower"                    # Flower writes here and nowhere else
FLWR_TELEMETRY_ENABLED=0                    # Flower would report its use to its makers
FLWR_DISABLE_UPDATE_CHECK=1                 # and ask them for newer versions
PATH="${BOUQUET_BIN:+$BOUQUET_BIN:}$PATH"
export FLWR_HOME FLWR_TELEMETRY_ENABLED FLWR_DISABLE_UPDATE_CHECK PATH
(
    umask 077
    cat > "$FLWR_HOME/config.toml.$$" <<END
# Written anew by every script of this folder: the names and ports stand in environment.sh.
[superlink]
default = "@LINK@"

[superlink.@LINK@]
address = "127.0.0.1:@CONTROL_PORT@"
@TRUST@
END
    mv "$FLWR_HOME/config.toml.$$" "$FLWR_HOME/config.toml"  # another command may read it right now
)
