"""What parallelize tells: a report on the model, one line of log on the first rank, and nothing printed."""

import contextlib
import copy
import dataclasses
import io
import logging
import pickle

import pytest
from harness.device import DEVICE
from harness.encoders import make, make_torch

import two_level_mha as tlm
from two_level_mha.report import Report


class Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[tuple[str, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append((record.levelname, record.getMessage()))


def told(level: int) -> tuple[str, list[tuple[str, str]], str]:
    """What is printed, what is logged, and the report's text."""
    logger, lines = logging.getLogger("two_level_mha"), Lines()
    before = logger.level
    logger.addHandler(lines)
    logger.setLevel(level)
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            model = tlm.parallelize(make("BertModel"), tlm.init_mesh(DEVICE, (2, 2)))
    finally:
        logger.removeHandler(lines)
        logger.setLevel(before)
    return out.getvalue() + err.getvalue(), lines.lines, str(tlm.report(model))


def test_logged_and_not_printed(pool):
    """Localises: a line on stdout or stderr, a line of a rank that is not the first, or one at another level."""
    found = pool.run(told, 4, logging.INFO)
    for rank, (printed, lines, report) in enumerate(found):
        assert printed == "" and report.startswith("2 attention modules and 2 MLPs split; parameters per rank ")
        assert lines == ([("INFO", report)] if rank == 0 else [])
    assert all(lines == [] for _, lines, _ in pool.run(told, 4, logging.WARNING))


def test_kept_on_the_model():
    """Localises: a report that a copy loses, that another model gets, or that is not what was done."""
    model = tlm.parallelize(make("BertModel"), None)
    report = tlm.report(model)
    assert isinstance(report, Report) and (report.attentions, report.mlps, report.tp_plans) == (2, 0, ())
    assert report.parameters == report.held_parameters == sum(p.numel() for p in model.parameters())
    assert report.split_bytes == 0 and sum(report.unsplit.values()) == report.unsplit_bytes == report.total_bytes
    assert list(report.unsplit.values()) == sorted(report.unsplit.values(), reverse=True)
    assert tlm.report(copy.deepcopy(model)) == pickle.loads(pickle.dumps(report)) == report
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.mlps = 1


def test_a_model_without_one():
    """Localises: the error for a model, or a part of one, that parallelize was not called with."""
    model = make_torch()
    with pytest.raises(tlm.GridError, match="Transformer has no report: .* that parallelize was called with"):
        tlm.report(model)
    tlm.parallelize(model.encoder, None)
    assert tlm.report(model.encoder).attentions == 2
    with pytest.raises(tlm.GridError, match="Transformer has no report"):
        tlm.report(model)
