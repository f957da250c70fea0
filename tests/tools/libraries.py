"""What libraries calculate anew for each config, and for each client of S3, calculated once: a
process that plays the program many times would else spend a third of its time on it."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import apacheconfig.parser
import botocore.hooks
import botocore.regions
import botocore.session
from botocore.loaders import create_loader

import s3napback


def calculate_once(replace: Callable[[Any, str, Any], None], folder: Path) -> None:
    """replace: as setattr; folder: where the tables of the config's grammar are kept."""
    yacc, tables = apacheconfig.parser.yacc, str(folder / "tables")
    replace(yacc, "yacc", functools.partial(yacc.yacc, picklefile=tables))
    (folder / "empty.conf").touch()
    s3napback.read_config(str(folder / "empty.conf"))  # writes them

    # botocore: the description of S3, the rules of its endpoints, the names of events, and which
    # of its handlers take any argument.
    replace(botocore.session, "create_loader", functools.cache(create_loader))
    providers: dict[int, Any] = {}
    provider = botocore.regions.EndpointProvider

    def one_provider(ruleset_data: Any, *rest: Any, **more: Any) -> Any:
        found = providers.get(id(ruleset_data))  # the loader hands out the same one each time
        if found is None:
            found = providers[id(ruleset_data)] = provider(ruleset_data, *rest, **more)
        return found

    replace(botocore.regions, "EndpointProvider", one_provider)
    names: dict[str, str] = {}
    start = botocore.hooks.EventAliaser.__init__

    def start_with_names(self: Any, *given: Any, **more: Any) -> None:
        start(self, *given, **more)
        self._alias_name_cache = names

    replace(botocore.hooks.EventAliaser, "__init__", start_with_names)
    known = functools.lru_cache(maxsize=1000)(botocore.hooks.accepts_kwargs)
    replace(botocore.hooks, "accepts_kwargs",
            lambda handler: known(getattr(handler, "__func__", handler)))
    gc.freeze()
