"""By which way SuperNodes reach a SuperLink: the one place that knows what Flower's versions do.

Up to 1.39 they speak gRPC, to a port of their own. From 1.40 on they speak HTTP, to the very port
on which the operator's `flwr` starts runs without a password.
"""

from importlib.metadata import version

from core.errors import UsageError

FLOWER = version("flwr")
LAST_WITH_GRPC = (1, 39)


def speaks_grpc(flower: str = FLOWER) -> bool:
    """Whether nodes of this version of Flower connect by gRPC.

    >>> speaks_grpc("1.39.0"), speaks_grpc("1.40.0")
    (True, False)
    """
    major, minor = flower.split(".")[:2]
    return (int(major), int(minor)) <= LAST_WITH_GRPC


def refuse_http(flower: str = FLOWER) -> None:
    """UsageError where sites of a deployment with TLS and keys could not connect safely.

    >>> refuse_http("1.42.0")
    Traceback (most recent call last):
    core.errors.UsageError: Flower 1.42.0 is installed, which ...
    """
    if not speaks_grpc(flower):
        raise UsageError(
            f"Flower {flower} is installed, which lets sites in at the operator's own port, where "
            "runs are started without a password. A deployment with TLS and keys needs Flower "
            "1.39, the last whose sites speak gRPC to a port of their own: pip install 'flwr<1.40'"
        )
