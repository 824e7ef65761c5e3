"""Stand-ins for the streams and events of a device that runs everything in order."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Stream:
    """A stream of a device that runs everything in order anyway."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.cuda_stream = 0

    def wait_stream(self, stream: Any) -> None:
        """Everything before has already run."""

    def wait_event(self, event: Any) -> None:
        """Everything before has already run."""

    def record_event(self, event: Any = None) -> "Event":
        """An event that has already happened."""
        return event or Event()

    def synchronize(self) -> None:
        """Everything has already run."""

    def is_capturing(self) -> bool:
        """No graph of kernels is recorded."""
        return False

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream)

    def __hash__(self) -> int:
        return 0


class Event:
    """An event that has always happened."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def record(self, stream: Any = None) -> None:
        """Nothing is pending."""

    def wait(self, stream: Any = None) -> None:
        """Nothing is pending."""

    def query(self) -> bool:
        """Nothing is pending."""
        return True

    def synchronize(self) -> None:
        """Nothing is pending."""

    def elapsed_time(self, other: "Event") -> float:
        """Milliseconds between two events; CPU work is not timed this way."""
        return 0.0


@contextmanager
def on_stream(stream: Any) -> Iterator[None]:
    """Everything runs in order on any stream."""
    yield


def stream_calls() -> dict[str, Any]:
    """The functions of `torch.cuda` about streams, as such a device answers them."""
    stream = Stream()
    return {
        "set_device": lambda device: None,
        "empty_cache": lambda: None,
        "current_stream": lambda device=None: stream,
        "default_stream": lambda device=None: stream,
        "stream": on_stream,
        "Stream": Stream,
        "Event": Event,
    }
