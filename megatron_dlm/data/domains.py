"""Settings by the domain of a record: a suffix of its prompt, and the longest response to it.

Published recipes ask for a boxed answer to mathematics and for a letter to multiple choice, and
limit responses by domain (OPDLM, appendix B).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from megatron_dlm.config.schema import Config
from megatron_dlm.data.records import PromptSource
from megatron_dlm.errors import UserError, bad_value

T = TypeVar("T")

DEFAULT = "default"
"""The entry for domains that a mapping does not name, and for records without one."""


@dataclass(frozen=True)
class Domains:
    """Mappings from a record's domain.

    Attributes:
        name: The field of a record that names its domain.
        prompt_suffix: Text that is appended to the prompt.
        max_response_length: Tokens of the longest response.
    """

    name: str = "domain"
    prompt_suffix: Mapping[str, str] = field(default_factory=dict)
    max_response_length: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def from_config(cls, config: Config) -> Domains:
        """The settings of a run."""
        return cls(
            config.template.domain_field,
            config.template.prompt_suffix_by_domain,
            config.template.max_response_length_by_domain,
        )

    def response_limit(self, record: Mapping[str, Any], where: str) -> int | None:
        """Tokens of the longest response to a record; None without a limit by domain.

        Raises:
            UserError: The record's domain has no entry, and there is none for all others.
        """
        limits = self.max_response_length
        return self._entry(limits, "--max-response-length-by-domain", record, where)

    def with_suffix(
        self, source: PromptSource, record: Mapping[str, Any], where: str
    ) -> PromptSource:
        """A prompt's text or chat with the suffix of the record's domain.

        In a chat it is appended to the last user message.

        Raises:
            UserError: As in `response_limit`; or the chat has no user message.
        """
        suffix = self._entry(self.prompt_suffix, "--prompt-suffix-by-domain", record, where)
        if not suffix:
            return source
        if isinstance(source, str):
            return source + suffix
        messages = source.messages
        users = [i for i, message in enumerate(messages) if message["role"] == "user"]
        if not users:
            raise UserError(
                f'{where}: no message has role "user", to append {suffix!r} of'
                " --prompt-suffix-by-domain to; add one"
            )
        last = users[-1]
        message = messages[last] | {"content": _appended(messages[last]["content"], suffix)}
        return replace(source, messages=[*messages[:last], message, *messages[last + 1 :]])

    def _entry(
        self, entries: Mapping[str, T], flag: str, record: Mapping[str, Any], where: str
    ) -> T | None:
        if not entries:
            return None
        domain = record.get(self.name)
        if isinstance(domain, str) and domain in entries:
            return entries[domain]
        if DEFAULT in entries:
            return entries[DEFAULT]
        raise bad_value(
            f'{where}: "{self.name}"',
            domain,
            f"has no entry in {flag}, which names {', '.join(entries)}",
            f"add one, or one for {DEFAULT}",
        )


NO_DOMAINS = Domains()
"""No setting depends on the domain."""


def _appended(content: Any, suffix: str) -> Any:
    """Text or parts of text with the suffix appended."""
    if isinstance(content, str):
        return content + suffix
    return [*content, {"type": "text", "text": suffix}]
