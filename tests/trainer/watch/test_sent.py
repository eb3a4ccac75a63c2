"""Which rows wandb has, whatever of the last ones is lost: against a list that stands for its server."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stepline.trainer.watch import sent as module
from stepline.trainer.watch.sent import NONE, Sent, place_of

ATTEMPT = st.tuples(st.integers(0, 9), st.integers(1, 12), st.integers(0, 12), st.booleans())
"""Steps that a resume goes back, steps that it makes, rows that are lost at its end, whether the summary is ahead."""


@pytest.mark.parametrize("kept", [4, 256])
@settings(max_examples=100, deadline=None)
@given(attempts=st.lists(ATTEMPT, min_size=1, max_size=5))
def test_every_row_is_there_once(tmp_path_factory, kept, attempts):
    path = tmp_path_factory.mktemp("sent") / "wandb-sent.json"
    server, logged, summary = [], [], -1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "KEPT_PLACES", kept)
        for back, steps, lost, ahead in [*attempts, (0, 1, 0, False)]:
            if kept == 4:  # beyond what is kept the run's own rows count, if it goes on where it was
                back = 0
            first = max(0, (logged[-1]["step"] if logged else 0) - back)
            logged = [row for row in logged if row["step"] <= first]
            before, held = len(server), Sent(path, 1.0)
            last = held.last_held(len(server), summary, [place_of(row) for row in logged])
            held.start("online", last if server else NONE, len(server))
            new = [{"step": step} for step in range(first + 1, first + 1 + steps)]
            new += [{"step": new[-1]["step"], "val_loss": 1.0}]
            for row in [*logged, *new]:
                if held.lacks(row):
                    server.append(place_of(row))
                    held.note(row)
            logged += new
            summary = server[-1][0]
            del server[max(before, len(server) - lost) :]
            if server and not ahead:
                summary = server[-1][0]
    steps = [place for place in server if not place[1]]
    assert steps == [(step, False) for step in range(1, len(steps) + 1)]
    assert len(set(server)) == len(server)
