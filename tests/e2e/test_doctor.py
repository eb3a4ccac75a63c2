"""`stepline doctor` as one starts it: two ranks under torchrun."""

import json
import sys

STEPLINE = ["-m", "stepline.trainer", "doctor"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def test_two_ranks_measure_and_rank_0_speaks(sh, tmp_path):
    out = sh(*TORCHRUN, *STEPLINE, "--folder", tmp_path, "--json").stdout
    report = json.loads(out)  # nothing else on standard output
    assert report["ok"] is True
    assert [rank["rank"] for rank in report["ranks"]] == [0, 1]
    checks = {check["name"]: check for check in report["checks"]}
    assert checks["all-reduce"]["value"]["ranks"] == 2
    assert checks["all-reduce"]["value"]["bus_bytes_per_s"] > 1e6
    assert max(checks["sync"]["value"]["codec_s"].values()) > 0  # these ranks encode on CPUs
    assert checks["ranks"]["status"] == checks["shared folder"]["status"] == "ok"


def test_links_that_do_not_work_end_in_a_sentence(sh, tmp_path):
    """gloo is told to use an interface that is not there; what else was found is shown all the same."""
    done = sh(
        *TORCHRUN, *STEPLINE, "--folder", tmp_path, "--timeout", "10", code=None, GLOO_SOCKET_IFNAME="nowhere"
    )
    assert done.returncode == 1
    assert "training will not work here: gloo" in done.stdout
    assert "GLOO_SOCKET_IFNAME" in done.stdout
    assert "all ranks see" in done.stdout
    assert "trainer/run" not in done.stderr, "a traceback of the program, beside torchrun's own"


def test_help_and_a_wrong_environment(sh):
    assert "Example: torchrun" in sh(sys.executable, *STEPLINE, "--help").stdout
    done = sh(sys.executable, *STEPLINE, code=2, RANK="3", WORLD_SIZE="2")
    assert done.stderr == "error: the environment's RANK is 3 but there are 2 ranks; start them by torchrun\n"
