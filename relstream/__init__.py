"""Hands data streams to consumers through Redis Streams, each owned by one living consumer."""

from relstream.client import StreamClient
from relstream.config import ClusterMode, RecoveryConfig, RetryConfig
from relstream.dead_letters import DeadLetter, DeadLetters
from relstream.errors import (
    AlreadyClaimed,
    AuthenticationFailed,
    ClientClosed,
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
from relstream.health import Health
from relstream.leases import OwnedStream
from relstream.notifications import LBSInfo, Notification, Notifications, NotificationType
from relstream.producer import Producer
from relstream.recorder import Recorder

__all__ = [
    "AlreadyClaimed",
    "AuthenticationFailed",
    "ClientClosed",
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
    "Health",
    "InvalidOption",
    "KeyspaceSetupFailed",
    "LBSInfo",
    "Notification",
    "NotificationType",
    "Notifications",
    "OwnedStream",
    "PermissionDenied",
    "Producer",
    "ProtocolError",
    "Recorder",
    "RecoveryConfig",
    "RelstreamError",
    "ReplyError",
    "RetryConfig",
    "ServerError",
    "ServerTooOld",
    "StreamClient",
    "StreamNotOwned",
    "UsageError",
]
