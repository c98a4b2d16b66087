"""Settings: one frozen object from one TOML file and the environment. Nothing else reads the environment."""

import ipaddress
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from gateway.errors import ConfigError

__all__ = [
    "ApiSettings",
    "GatewaySettings",
    "ModelsSettings",
    "PrivacySettings",
    "Settings",
    "SpoolSettings",
    "WorkSettings",
    "environment",
    "load_settings",
]

CONFIG_FILE = "understudy.toml"


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class _Listening(_Section):
    """An address. `auth` says whether a key is wanted there: `auto` is off on loopback and on everywhere else."""

    host: str = "127.0.0.1"
    auth: Literal["auto", "on", "off"] = "auto"

    @property
    def loopback(self) -> bool:
        """Whether only this machine reaches `host`."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    @property
    def authenticates(self) -> bool:
        """Whether clients need a key."""
        return self.auth == "on" or (self.auth == "auto" and not self.loopback)


class GatewaySettings(_Listening):
    """The request path. Sizes in bytes, times in seconds.

    `open_to_network` is the word that an address other than loopback wants where `auth` is off. `access_log` is `off`,
    `stdout` or a file's path; of what went well it has the share `access_log_sample`.

    `max_connections` is a worker's. A request's head is to be here `head_timeout` after its begin; a body, and a reply
    that the client takes, may stand still no longer than `stall_timeout`.
    """

    port: int = Field(default=8080, ge=0, le=65535)
    workers: int = Field(default=1, ge=1, le=64)
    max_body: int = Field(default=64 * 1024 * 1024, ge=1024)
    max_head: int = Field(default=64 * 1024, ge=1024)
    max_connections: int = Field(default=10_000, ge=1)
    head_timeout: float = Field(default=10.0, gt=0)
    stall_timeout: float = Field(default=60.0, gt=0)
    drain: float = Field(default=30.0, ge=0)
    overlay_poll: float = Field(default=0.25, gt=0)
    open_to_network: bool = False
    access_log: str = "off"
    access_log_sample: float = Field(default=1.0, ge=0, le=1)


class ApiSettings(_Listening):
    """The control plane and its page, served by the controller; port 0 serves neither.

    Where the gateway wants keys, `auth = auto` wants them here too. `hosts` are the names by which it is reached,
    beside IP addresses, localhost and `host`.
    """

    port: int = Field(default=8090, ge=0, le=65535)
    hosts: tuple[str, ...] = ()


class SpoolSettings(_Section):
    """The log's first station. `max_total` caps the folder; `on_full` decides what happens then."""

    segment: int = Field(default=64 * 1024 * 1024, ge=4096)
    segment_age: float = Field(default=5.0, gt=0)
    max_total: int = Field(default=8 * 1024 * 1024 * 1024, ge=8192)
    on_full: Literal["serve", "refuse"] = "serve"
    fsync: Literal["never", "interval", "always"] = "interval"
    fsync_interval: float = Field(default=0.1, gt=0)
    ship_interval: float = Field(default=0.1, gt=0)
    ship_batch: int = Field(default=500, ge=1, le=10_000)


class WorkSettings(_Section):
    """The controller. Times in seconds."""

    tick: float = Field(default=1.0, gt=0)
    lease: float = Field(default=10.0, gt=0)


class ModelsSettings(_Section):
    """Where model libraries live: the Python of the environment that has torch, peft and vLLM."""

    python: Path = Path(".models/bin/python")
    max_lora_rank: int = Field(default=32, ge=1)


class PrivacySettings(_Section):
    """What is masked beside the built-in kinds, in workloads whose routing.yaml says `privacy`.

    `patterns` are regular expressions by name, in RE2's syntax. `salt` goes into the pseudonyms of client and session
    ids. `presidio` needs the extra `privacy` and a language model.
    """

    patterns: dict[str, str] = {}
    presidio: bool = False
    salt: str = Field(default="", max_length=64, repr=False)


class Settings(BaseSettings):
    """All settings. Environment variables are `UNDERSTUDY_<NAME>` and `UNDERSTUDY_<SECTION>__<NAME>`."""

    model_config = SettingsConfigDict(env_prefix="UNDERSTUDY_", env_nested_delimiter="__", frozen=True, extra="forbid")

    data_dir: Path = Path("understudy-data")
    routing_file: Path = Path("routing.yaml")
    database_url: str = ""
    log_store_url: str = ""
    log_sinks: tuple[str, ...] = ()
    log_retention_days: int | None = Field(default=None, ge=1)
    gateway: GatewaySettings = GatewaySettings()
    api: ApiSettings = ApiSettings()
    spool: SpoolSettings = SpoolSettings()
    work: WorkSettings = WorkSettings()
    models: ModelsSettings = ModelsSettings()
    privacy: PrivacySettings = PrivacySettings()

    @property
    def database(self) -> str:
        """SQLAlchemy URL of the control state; embedded SQLite unless one is set."""
        return self.database_url or f"sqlite+aiosqlite:///{(self.data_dir / 'control.db').absolute()}"

    @property
    def log_store(self) -> str:
        return self.log_store_url or f"sqlite:///{(self.data_dir / 'log.db').absolute()}"

    @property
    def api_authenticates(self) -> bool:
        """Whether the control plane wants an admin key."""
        return self.api.authenticates or (self.api.auth == "auto" and self.gateway.authenticates)

    @property
    def spool_dir(self) -> Path:
        return self.data_dir / "spool"

    @property
    def artifacts(self) -> Path:
        return self.data_dir / "artifacts"

    @property
    def run_dir(self) -> Path:
        """Small files of running processes: metrics, the last good routing snapshot."""
        return self.data_dir / "run"

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return env_settings, init_settings  # the environment wins over the file, which comes as init values


def load_settings(config: Path | None = None) -> Settings:
    """Read `config`, or understudy.toml of the working directory if it is there, then the environment.

    Raises ConfigError, naming the file and the key.
    """
    named = config or (Path(named_by_env) if (named_by_env := os.environ.get("UNDERSTUDY_CONFIG")) else None)
    path = named or Path(CONFIG_FILE)
    values: dict[str, Any] = {}
    if named is not None or path.exists():
        try:
            values = tomllib.loads(path.read_text())
        except FileNotFoundError as error:
            raise ConfigError(f"{path}: no such file; create it or drop --config") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: {error}") from error
    try:
        return Settings(**values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"{path} or UNDERSTUDY_*: {key}: {first['msg']}") from error


def environment() -> Mapping[str, str]:
    """The process's environment, for `env:` references in routing.yaml and for child processes."""
    return dict(os.environ)
