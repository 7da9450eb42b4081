"""The picture of a step: from the profiler's planes to bars, on synthetic events."""

import jax
import pytest
from matplotlib.axes import Axes

from zo2jax import cli
from zo2jax.bench import trace
from zo2jax.bench.throughput import Setting
from zo2jax.bench.trace import LANES, Event, Window, busy, draw, events, middle

pytestmark = pytest.mark.usefixtures("quick_compilation")

TINY = Setting("opt-tiny", layers=1, tokens=8)

PLANES = """
planes { name: "/host:CPU" lines { id: 1 name: "Stream" events { metadata_id: 1 duration_ps: 9 } }
  event_metadata { key: 1 value { id: 1 name: "MemcpyH2D" } } }
planes { name: "/device:GPU:0"
  lines { id: 1 name: "Stream #13(MemcpyH2D)" timestamp_ns: 5000000
    events { metadata_id: 1 offset_ps: 0 duration_ps: 2000000000 } }
  lines { id: 2 name: "Stream #14(Compute)" timestamp_ns: 6000000
    events { metadata_id: 2 offset_ps: 1000000000 duration_ps: 500000000 } }
  lines { id: 3 name: "Stream #21" timestamp_ns: 9000000
    events { metadata_id: 3 offset_ps: 0 duration_ps: 1000000000 } }
  lines { id: 4 name: "XLA Ops" timestamp_ns: 1 events { metadata_id: 2 duration_ps: 7 } }
  event_metadata { key: 1 value { id: 1 name: "MemcpyH2D" } }
  event_metadata { key: 2 value { id: 2 name: "gemm_fusion" } }
  event_metadata { key: 3 value { id: 3 name: "MemcpyD2H" } } }
"""


def planes(text):
    data = jax.profiler.ProfileData
    return data.from_serialized_xspace(data.text_proto_to_serialized_xspace(text)).planes


def test_events_of_a_trace_are_those_of_the_gpus_streams():
    assert events(planes(PLANES)) == [
        Event("upload", 0.0, 2.0),
        Event("compute", 2.0, 0.5),
        Event("write-back", 4.0, 1.0),
    ]


def test_a_trace_without_a_gpu_is_refused():
    with pytest.raises(ValueError, match="no work of a GPU"):
        events(planes('planes { name: "/host:CPU" }'))


@pytest.mark.parametrize(
    ("spans", "share"),
    [
        ([], 0.0),
        ([(0, 10)], 1.0),
        ([(-5, 100)], 1.0),
        ([(0, 2), (8, 5)], 0.4),
        ([(1, 4), (2, 1), (4, 2)], 0.5),
        ([(-3, 2), (10, 1)], 0.0),
    ],
)
def test_the_share_of_a_window_that_a_lane_is_busy(spans, share):
    happened = [Event("compute", start, duration) for start, duration in spans] + [Event("upload", 3.0, 4.0)]
    assert busy(happened, "compute", Window(0.0, 10.0)) == pytest.approx(share)


def test_the_window_is_in_the_middle_of_the_last_step():
    happened = [Event("upload", 0.0, 300.0), Event("compute", 350.0, 50.0)]
    assert middle(happened, 80.0) == Window(260.0, 340.0)
    assert middle(happened, 1e9) == Window(200.0, 400.0)


def test_the_picture_is_in_the_format_that_its_name_says(tmp_path):
    happened = [Event(lane, float(i), 0.5) for i in range(10) for lane in LANES]
    for name, start in (("trace.png", b"\x89PNG"), ("trace.svg", b"<?xml"), ("trace.pdf", b"%PDF")):
        draw(happened, Window(2.0, 5.0), "title", tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(start)


def test_the_picture_has_lanes_of_the_events_in_its_window(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(Axes, "broken_barh", lambda axes, spans, where, **options: drawn.append((spans, where)))
    happened = [Event("upload", 1.0, 2.0), Event("write-back", 2.5, 1.0), Event("upload", 6.0, 1.0)]
    draw(happened, Window(2.0, 5.0), "title", tmp_path / "trace.png")
    assert drawn == [([(-1.0, 2.0)], (-0.4, 0.8)), ([], (0.6, 0.8)), ([(0.5, 1.0)], (1.6, 0.8))]


def test_two_steps_are_traced_after_others(monkeypatch):
    """Up to the profiler's file, which has no GPU here."""
    steps, seen = [], []
    monkeypatch.setattr(trace, "_check_device", lambda: None)
    monkeypatch.setattr(trace, "timed_step", lambda run, batch: steps.append(batch["ids"].shape))
    monkeypatch.setattr(trace, "events", lambda planes: seen.extend(p.name for p in planes) or [Event("upload", 0, 1)])
    found = trace.traced(TINY)
    assert steps == [(1, 8)] * 6 and "/host:CPU" in seen
    assert found["events"] == [("upload", 0, 1)] and found["parameters"] == 197568


def test_a_trace_is_drawn_by_the_process_that_was_asked(tmp_path, monkeypatch, capsys):
    found = {"events": [["upload", 0.0, 300.0], ["compute", 300.0, 100.0]], "parameters": 197568, "device": "d"}
    monkeypatch.setattr(trace, "measured", lambda *arguments, env: found | {"versions": {"jax": "0"}})
    file = tmp_path / "trace.png"
    assert cli.main(["bench", "trace", "--model", "opt-tiny", "-o", str(file), "--window", "80"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert file.is_file() and "80 ms of a step, busy: upload 50%, compute 50%, write-back 0%" in out


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="there is a GPU to trace")
def test_a_trace_on_the_cpu_says_what_is_missing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(trace, "measured", lambda name, function, setting, env: function(setting))
    assert cli.main(["bench", "trace", "--model", "opt-tiny", "-o", str(tmp_path / "trace.png")]) == 1
    assert "a trace shows an NVIDIA GPU's transfers, and the default device is" in capsys.readouterr().err


@pytest.mark.parametrize("window", ["0", "-1", "nan"])
def test_a_window_of_nothing_is_refused(tmp_path, capsys, window):
    assert cli.main(["bench", "trace", "--model", "tiny", "-o", str(tmp_path / "a.png"), f"--window={window}"]) == 1
    assert "expected more than 0" in capsys.readouterr().err
