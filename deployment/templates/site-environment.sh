# For the script beside it. Bouquet and Flower are looked for in BOUQUET_BIN, then in PATH.
FLWR_HOME="$here/flower"                    # Flower writes here and nowhere else
FLWR_TELEMETRY_ENABLED=0                    # Flower would report its use to its makers
FLWR_DISABLE_UPDATE_CHECK=1                 # and ask them for newer versions
HF_HUB_OFFLINE=1                            # the base model lies on this machine; fetch nothing
PATH="${BOUQUET_BIN:+$BOUQUET_BIN:}$PATH"
export FLWR_HOME FLWR_TELEMETRY_ENABLED FLWR_DISABLE_UPDATE_CHECK HF_HUB_OFFLINE PATH
