"""Hands data streams to consumers through Redis Streams, each owned by one living consumer."""

from relstream.client import StreamClient
from relstream.config import ClusterMode, RecoveryConfig, RetryConfig, RetryDelay
from relstream.dead_letters import DeadLetter, DeadLetters
from relstream.delayed import Delayed, DelayedEntry
from relstream.engine.health import Health
from relstream.errors import (
    AlreadyClaimed,
    AuthenticationFailed,
    ClientClosed,
    ClientTerminated,
    ClusterClientRequired,
    ClusterNotSettled,
    ConfigConflict,
    ConnectionFailed,
    ConnectionLost,
    ConsumerIdMissing,
    DeadlineExceeded,
    InvalidOption,
    KeyspaceSetupFailed,
    PermissionDenied,
    ProtocolError,
    RelstreamError,
    ReplyError,
    ServerError,
    ServerTooOld,
    StreamNotOwned,
    UsageError,
)
from relstream.notifications import LBSInfo, Notification, Notifications, NotificationType
from relstream.ownership.leases import OwnedStream
from relstream.producer import Producer
from relstream.recorder import Outcome, Recorder
from relstream.running import run

__all__ = [
    "AlreadyClaimed",
    "AuthenticationFailed",
    "ClientClosed",
    "ClientTerminated",
    "ClusterClientRequired",
    "ClusterMode",
    "ClusterNotSettled",
    "ConfigConflict",
    "ConnectionFailed",
    "ConnectionLost",
    "ConsumerIdMissing",
    "DeadLetter",
    "DeadLetters",
    "DeadlineExceeded",
    "Delayed",
    "DelayedEntry",
    "Health",
    "InvalidOption",
    "KeyspaceSetupFailed",
    "LBSInfo",
    "Notification",
    "NotificationType",
    "Notifications",
    "Outcome",
    "OwnedStream",
    "PermissionDenied",
    "Producer",
    "ProtocolError",
    "Recorder",
    "RecoveryConfig",
    "RelstreamError",
    "ReplyError",
    "RetryConfig",
    "RetryDelay",
    "ServerError",
    "ServerTooOld",
    "StreamClient",
    "StreamNotOwned",
    "UsageError",
    "run",
]
