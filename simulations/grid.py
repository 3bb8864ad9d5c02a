"""Flower's Grid without processes or network: messages go straight to the ClientApp.

The ServerApp and the ClientApp are the very objects that a deployment runs. Clients answer one
after the other in this process, so that one base model serves them all; every answer depends only
on its message, its site and what that site keeps, not on who came before. What sites keep between
rounds lies in a folder, as it would on a site's disk, so that a resumed run finds it again.
"""

import itertools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from flwr.app import ArrayRecord, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from core.files import write_durably
from settings.keys import Value
from settings.site import client_name
from simulations.holdings import Holdings
from wire.records import from_record, to_record

RUN_ID = 1
SERVER_NODE = 1
FIRST_CLIENT_NODE = 2
CLIENT_FAILED = 2


class InProcessGrid(Grid):
    """Clients 0 to count - 1, played by one ClientApp."""

    def __init__(
        self,
        client_app: ClientApp,
        count: int,
        run_config: dict[str, Value],
        on_message: Callable[[str, int], None] = lambda kind, client: None,
        keep: Path | None = None,
        node_configs: Sequence[dict[str, Value]] | None = None,
        holdings: Holdings | None = None,
    ) -> None:
        """keep: folder for what the clients keep between rounds; None: in memory only.

        holdings: what they hold of the global model; None: nothing yet, and in memory only.
        node_configs: of clients that own what separate sites own; None: parts of one data set.
        """
        self._keep = keep
        self._holdings = holdings or Holdings()
        self._app = client_app
        self._on_message = on_message
        self._run = Run.create_empty(RUN_ID)
        self._numbers = itertools.count()
        self._replies: dict[str, Message] = {}
        self._contexts = {
            FIRST_CLIENT_NODE + client: Context(
                run_id=RUN_ID,
                node_id=FIRST_CLIENT_NODE + client,
                node_config=(
                    dict(node_configs[client])
                    if node_configs is not None
                    else {"partition-id": client, "num-partitions": count}
                ),
                state=self._kept(client),
                run_config=run_config,
            )
            for client in range(count)
        }
        _take_identity()

    def set_run(self, run: Run) -> None:
        """Take another Run object; nothing here depends on it."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run, empty but for its id."""
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """A message as Flower's own grids make it."""
        return Message(
            content,
            dst_node_id=dst_node_id,
            message_type=message_type,
            group_id=group_id,
            ttl=ttl,
        )

    def get_node_ids(self) -> Iterable[int]:
        """The nodes of all clients."""
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Answer each message now; the replies wait to be pulled."""
        sent = [self._deliver(message) for message in messages]
        self._holdings.save()
        return sent

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The replies to these messages, each once."""
        wanted = [message_id for message_id in message_ids if message_id in self._replies]
        return [self._replies.pop(message_id) for message_id in wanted]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Every message answered, in order; the timeout cannot pass in process."""
        return self.pull_messages(self.push_messages(messages))

    def _deliver(self, message: Message) -> str:
        message_id = f"message-{next(self._numbers)}"
        message.metadata.__dict__["_message_id"] = message_id  # as Flower's own grid does
        node = message.metadata.dst_node_id
        self._on_message(message.metadata.message_type, node - FIRST_CLIENT_NODE)
        name = client_name(node - FIRST_CLIENT_NODE)
        message = self._holdings.complete(name, message)
        try:
            reply = self._app(message, self._contexts[node])
        except Exception as error:  # as Flower does: one client's crash is that client's reply
            reply = Message(
                Error(CLIENT_FAILED, f"{type(error).__name__}: {error}"), reply_to=message
            )
        if reply is not None and reply.has_content():
            self._holdings.tell(name, reply.content)
        self._replies[message_id] = reply
        self._write_kept(node)
        return message_id

    def _kept(self, client: int) -> RecordDict:
        """What this client kept, from its folder."""
        if self._keep is None:
            return RecordDict()
        files = sorted((self._keep / client_name(client)).glob("*.safetensors"))
        return RecordDict({file.stem: to_record(file.read_bytes()) for file in files})

    def _write_kept(self, node: int) -> None:
        """Bring the client's folder up to what it keeps now."""
        state = self._contexts[node].state
        if self._keep is None or not state:
            return
        folder = self._keep / client_name(node - FIRST_CLIENT_NODE)
        folder.mkdir(parents=True, exist_ok=True)
        known = {file.stem for file in folder.glob("*.safetensors")}
        for name, record in state.items():
            assert isinstance(record, ArrayRecord)
            data, path = from_record(record), folder / f"{name}.safetensors"
            if name not in known or path.read_bytes() != data:
                write_durably(folder / ".writing", data)
                (folder / ".writing").rename(path)
        for name in known - set(state):
            (folder / f"{name}.safetensors").unlink()


def _take_identity() -> None:
    """Messages can only be made by a task; outside Flower's processes this process is one."""
    TaskIdentity.task_id = RUN_ID
    TaskIdentity.run_id = RUN_ID
    TaskIdentity.node_id = SERVER_NODE
