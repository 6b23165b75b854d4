"""The authors' tables: what is refused, what the campaign makes of them, and how they are fetched."""

from __future__ import annotations

import hashlib
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from published_rows import clean_rows, published_file, row, sweep_rows, write
from t2v_energy import cli
from t2v_energy.config import PublishedFile, load_campaign
from t2v_energy.errors import UserError
from t2v_energy.published import fetch as fetching
from t2v_energy.published.campaign import CAMPAIGN, REFUSED, configurations
from t2v_energy.published.tables import check_sha256, read_cross_model, read_sweeps

ROOT = Path(__file__).resolve().parents[2]
Rows = list[dict[str, object]]


# --- bad input ----------------------------------------------------------------------------------------------


def without(name: str) -> Rows:
    return [{key: value for key, value in each.items() if key != name} for each in clean_rows()]


def with_cell(name: str, value: object) -> Rows:
    rows = clean_rows()
    return [*rows[:3], rows[3] | {name: value}, *rows[4:]]


def in_watt_hours() -> Rows:
    return [
        each | {"energy_generate_gpu": 1e3 * float(str(each["energy_generate_gpu"]))} for each in clean_rows()
    ]


def with_text(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


BAD: list[tuple[str, Callable[[Path], Path], str]] = [
    (
        "missing column",
        lambda p: write(p, without("energy_generate_cpu")),
        "'energy_generate_cpu' is missing",
    ),
    ("wrong unit", lambda p: write(p, in_watt_hours()), "must be in kWh"),
    (
        "not a number",
        lambda p: write(p, with_cell("energy_generate_ram", "nan")),
        "line 5, energy_generate_ram: 'nan'",
    ),
    ("empty cell", lambda p: write(p, with_cell("duration_generate", "")), "line 5, duration_generate: ''"),
    ("negative", lambda p: write(p, with_cell("energy_generate_gpu", -1)), "'-1' is not a positive number"),
    ("duplicate", lambda p: write(p, [*clean_rows(), clean_rows()[2]]), "line 14 repeats line 4"),
    ("empty", lambda p: with_text(p, ""), "the file is empty"),
    ("html", lambda p: with_text(p, "<html><body>404</body></html>"), "this is HTML"),
    ("unknown model", lambda p: write(p, with_cell("model_name", "Sora")), "'Sora' is none of ours"),
]


@pytest.mark.parametrize(("make", "says"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_bad_input_is_one_line_and_nothing_is_written(
    tmp_path: Path,
    unpinned: Path,
    capsys: pytest.CaptureFixture[str],
    make: Callable[[Path], Path],
    says: str,
) -> None:
    path, out = make(tmp_path / "bad.csv"), tmp_path / "out" / "configurations.csv"
    code = cli.main(["--root", str(unpinned), "adapt", "--cross-model", str(path), "--out", str(out)])
    error = capsys.readouterr().err
    assert code == 2
    assert says in error
    assert str(path) in error
    assert error.count("\n") == 2, "what and where, then what to do"
    assert not out.exists()


def test_wrong_checksum_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = write(tmp_path / "other.csv", clean_rows()), tmp_path / "configurations.csv"
    assert cli.main(["--root", str(ROOT), "adapt", "--cross-model", str(path), "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert hashlib.sha256(path.read_bytes()).hexdigest() in error
    assert str(load_campaign(ROOT, CAMPAIGN).sources["cross_model"].sha256) in error
    assert not out.exists()


def test_an_unknown_parameter_of_the_sweeps_is_refused(tmp_path: Path) -> None:
    rows = sweep_rows()
    rows[4]["parameter"] = "seed"
    with pytest.raises(UserError, match="line 6: parameter is 'seed'"):
        read_sweeps(write(tmp_path / "s.csv", rows))
    with pytest.raises(UserError, match="'parameter' is missing"):
        read_sweeps(write(tmp_path / "c.csv", clean_rows()))


def test_no_table_at_all(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="neither table"):
        configurations(ROOT, None, None)


@pytest.fixture
def unpinned(tmp_path: Path) -> Path:
    """A root whose campaign pins no checksum, for self-written rows."""
    root = tmp_path / "root"
    (root / "config" / "campaigns").mkdir(parents=True)
    for name in ("models", "experiments", "accelerators.yaml", "study.yaml", "config.yaml"):
        (root / "config" / name).symlink_to(ROOT / "config" / name)
    text = (ROOT / "config" / "campaigns" / f"{CAMPAIGN}.yaml").read_text()
    pinned = str(load_campaign(ROOT, CAMPAIGN).sources["cross_model"].sha256)
    (root / "config" / "campaigns" / f"{CAMPAIGN}.yaml").write_text(text.replace(pinned, "null"))
    return root


# --- what the campaign makes of them ------------------------------------------------------------------------


def test_means_are_over_prompts_and_all_windows(tmp_path: Path) -> None:
    ltx = [
        row("LTX-Video-0.9.7-dev", f"p{i}", duration_s=9.0 + i, gpu_W=600, size=(512, 704, 121, 30))
        | {"duration_upsample": 0.5, "duration_denoise": 8.0}
        | {f"energy_upsample_{part}": 1e-6 for part in ("gpu", "cpu", "ram")}
        | {f"energy_denoise_{part}": 1e-3 for part in ("gpu", "cpu", "ram")}
        for i in range(3)
    ]
    table = configurations(ROOT, write(tmp_path / "t.csv", [*clean_rows(), *ltx]), None).set_index("model")
    found = table.loc["ltx-video-0.9.7-dev"]
    assert found["latency_s"] == pytest.approx(10 + 8.5)
    assert found["latency_s_std"] == pytest.approx(1)
    assert found["latency_s_ci95"] == pytest.approx(4.302653 / 3**0.5)
    assert found["latency_s_n"] == 3
    assert found["first_window_s"] == pytest.approx(10)
    assert found["gpu_energy_Wh"] == pytest.approx(600 * 10 / 3600 + 1.001)
    kinds = [found[f"{part}_energy_Wh_kind"] for part in ("gpu", "cpu", "ram")]
    assert kinds == ["measured", "modelled", "constant"]
    assert not any("_share" in name or name.startswith("step") for name in table.columns), (
        "no spans, no stages"
    )


def test_a_label_gives_way_to_what_the_work_says(tmp_path: Path) -> None:
    rows = [row("WAN2.1-T2V-1.3B", duration_s=410, size=(480, 832, 81, 60)),
            row("Mochi-1-preview", duration_s=263, size=(480, 848, 84, 64))]  # fmt: skip
    wan, mochi = configurations(ROOT, write(tmp_path / "t.csv", rows), None).to_dict("records")
    assert wan["configuration_id"] == "wan2.1-t2v-1.3b_720x1280_81f_50s"
    assert (wan["labelled"], wan["flags"]) == ("480x832_81f_60s", "label_refuted_by_work")
    assert 0.25 < wan["mfu"] < 0.35
    assert (mochi["num_frames"], mochi["flags"]) == (79, "frames_as_made")


def test_sweeps_become_the_experiments_of_our_own(tmp_path: Path) -> None:
    more = [
        row("WAN2.1-T2V-1.3B", duration_s=400, size=(720, 1280, frames, 50), parameter="frames")
        for frames in (81, 82)
    ]
    refused = row("WAN2.1-T2V-1.3B", duration_s=9000, size=(1980, 3520, 81, 50), parameter="res")
    table = configurations(ROOT, None, write(tmp_path / "s.csv", [*sweep_rows(), *more, refused]))
    assert table["experiment"].value_counts().to_dict() == {"resolution": 5, "frames": 5, "steps": 4}
    assert not table.duplicated(["experiment", "configuration_id"]).any()
    merged = table[(table["experiment"] == "frames") & (table["num_frames"] == 81)].iloc[0]
    assert merged["labelled"] == "720x1280_80f_50s;720x1280_81f_50s;720x1280_82f_50s"
    assert merged["latency_s_n"] == 3
    assert table.loc[table["height"] == 1980, "status"].tolist() == [REFUSED]


@pytest.mark.skipif(published_file() is None, reason="the authors' file is not here")
def test_the_authors_file_is_the_pinned_one_and_gives_seven_models() -> None:
    path = published_file()
    assert path is not None
    check_sha256(path, load_campaign(ROOT, CAMPAIGN).sources["cross_model"].sha256)
    table = configurations(ROOT, path, None)
    assert len(table) == 7
    assert table["mfu"].between(0.15, 0.4).all()
    assert table["latency_s_n"].tolist() == [49] * 6 + [41]
    assert len(read_cross_model(path)) == 335


# --- fetching -----------------------------------------------------------------------------------------------


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Path]]:
    """An HTTPS server of our own: its address and the folder that it serves."""
    folder, key, certificate = tmp_path / "www", tmp_path / "key.pem", tmp_path / "certificate.pem"
    folder.mkdir()
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost",
         "-addext", "subjectAltName=DNS:localhost", "-keyout", key, "-out", certificate],
        check=True, capture_output=True,
    )  # fmt: skip
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate))
    monkeypatch.setattr(fetching, "BACKOFF_S", 0.0)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    http = ThreadingHTTPServer(("localhost", 0), partial(SimpleHTTPRequestHandler, directory=str(folder)))
    http.socket = context.wrap_socket(http.socket, server_side=True)
    thread = threading.Thread(target=http.serve_forever)
    thread.start()
    yield f"https://localhost:{http.server_port}", folder
    http.shutdown()
    thread.join()
    http.server_close()


def test_a_table_is_fetched_whole_and_checked(server: tuple[str, Path], tmp_path: Path) -> None:
    url, folder = server
    path, out = write(folder / "t.csv", clean_rows()), tmp_path / "out" / "t.csv"
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    pinned = PublishedFile(url=f"{url}/t.csv", revision="1", sha256=digest)
    assert fetching.fetch(pinned, "cross_model", out) == digest
    assert out.read_bytes() == path.read_bytes()
    out.unlink()
    with pytest.raises(UserError, match="SHA-256"):
        fetching.fetch(pinned.model_copy(update={"sha256": "0" * 64}), "cross_model", out)
    unpinned = pinned.model_copy(update={"sha256": None})
    with pytest.raises(UserError, match="'parameter' is missing"):
        fetching.fetch(unpinned, "sweeps", out)
    (folder / "page.csv").write_text("<!DOCTYPE html>")
    with pytest.raises(UserError, match="HTML"):
        fetching.fetch(unpinned.model_copy(update={"url": f"{url}/page.csv"}), "cross_model", out)
    with pytest.raises(UserError, match="404"):
        fetching.fetch(unpinned.model_copy(update={"url": f"{url}/none.csv"}), "cross_model", out)
    assert list(out.parent.iterdir()) == [], "nothing of what was refused is left"


def test_without_a_network_it_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "BACKOFF_S", 0.0)
    nowhere = PublishedFile(url="https://localhost:9/t.csv", revision="1")
    with pytest.raises(UserError, match="published_sweeps=FILE") as error:
        fetching.fetch(nowhere, "sweeps", tmp_path / "t.csv")
    assert "https://localhost:9/t.csv" in str(error.value)
    assert not list(tmp_path.iterdir())
