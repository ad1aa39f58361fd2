"""Everything that a run writes while it trains: `metrics.jsonl`, `events.jsonl`, `tensorboard/`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mole_mega.adapters.routing import RoutingSummary
from mole_mega.config import MonitorConfig
from mole_mega.monitor.alarms import Alarm
from mole_mega.monitor.metrics import MetricsFile, Row
from mole_mega.monitor.pictures import routing_pictures
from mole_mega.monitor.tensorboard import Board, board_layout


class RunLogs:
    """The logs of one run directory, opened by one process for a run that goes on after `resume_step`. `layers` are
    those that have a router."""

    def __init__(
        self, folder: Path, monitor: MonitorConfig, resume_step: int, layers: Sequence[int], domains: Sequence[str]
    ) -> None:
        self._domains = domains
        layout = board_layout(layers, domains)
        self._board = Board(folder / "tensorboard", resume_step, layout) if monitor.tensorboard else None
        self._metrics = MetricsFile(folder / "metrics.jsonl", resume_step)
        self._events = MetricsFile(folder / "events.jsonl", resume_step)

    def row(self, row: Row) -> None:
        self._metrics.write(row)
        if self._board is not None:
            self._board.write(row)

    def alarms(self, alarms: Sequence[Alarm]) -> None:
        for alarm in alarms:
            self._events.write(alarm.row())
        if alarms and self._board is not None:
            self._board.text("alarms", "\n".join(f"- {alarm}" for alarm in alarms), alarms[0].step)

    def pictures(self, routing: RoutingSummary, step: int) -> None:
        if self._board is not None:
            for tag, picture in routing_pictures(routing, self._domains).items():
                self._board.picture(tag, picture, step)

    def close(self) -> None:
        self._metrics.close()
        self._events.close()
        if self._board is not None:
            self._board.close()
