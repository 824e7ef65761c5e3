"""A bad token that one replica meets ends the run on all of them, with one message."""

from pathlib import Path

from megatron_dlm.errors import UserError
from tests.corpora import write_corpus
from tests.distributed_tests.spawn import run_distributed
from tests.tiny import run_config, run_training, save_random_model, write_data


def _message(rank: int, folder: Path) -> str:
    config = run_config(
        folder,
        folder / "model",
        objective="scp",
        data_path=str(folder / "bad"),
        shuffle=False,
        train_iters=2,
    )
    try:
        run_training(config)
    except UserError as error:
        return str(error)
    return ""


def test_all_ranks_say_what_one_has_met(tmp_path: Path) -> None:
    write_data(tmp_path)
    save_random_model(tmp_path / "model")
    # Samples are dealt out in turns, and a window is a document: those of rank 0 are good.
    documents = [[7] * 48 for _ in range(16)]
    documents[5][3] = 600
    write_corpus(tmp_path / "bad", documents)
    first, last = run_distributed(_message, 2, tmp_path, timeout_seconds=60)
    assert first == last
    assert first.startswith("--data-path: document 5 = 600: is no token of")
