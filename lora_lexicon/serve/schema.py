"""What requests hold, and their limits. Knows nothing of models."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from lora_lexicon.inference.requests import is_readable
from lora_lexicon.inference.sampling import Decoding
from lora_lexicon.serve.problems import Problem

MAX_BODY = 4 * 2**20  # bytes
MAX_TERM, MAX_CONTEXT = 200, 4000  # characters
MAX_TEXT = 2**17  # characters of all the text in a call that is to be continued
MAX_TOKENS, MAX_REQUESTS, MAX_SAMPLES, MAX_MESSAGES = 256, 64, 16, 1024
MIN_TEMPERATURE = 0.01  # logits divided by much less are no numbers any more


def clean_term(text: str) -> str:
    """A term without space around it.

    Raises:
        ValueError: it is empty, too long, or holds control characters.
    """
    text = text.strip()
    if not text:
        raise ValueError("the term is empty: write the word to look up")
    if len(text) > MAX_TERM:
        raise ValueError(f"the term has {len(text)} characters; at most {MAX_TERM} are read: shorten it")
    if not is_readable(text):
        raise ValueError("the term holds control characters: take them out")
    return text


def clean_context(text: str) -> str:
    """A context without space around it; line ends and tabs may stand in it."""
    text = text.strip()
    if len(text) > MAX_CONTEXT:
        raise ValueError(f"the context has {len(text)} characters; at most {MAX_CONTEXT} are read: shorten it")
    if not is_readable(text, "\n\r\t"):
        raise ValueError("the context holds control characters: take them out")
    return text


def _none_is_empty(value: Any) -> Any:
    return "" if value is None else value


Term = Annotated[
    str, AfterValidator(clean_term), Field(description=f"The word to define, at most {MAX_TERM} characters.")
]
Context = Annotated[
    str,
    BeforeValidator(_none_is_empty),
    AfterValidator(clean_context),
    Field(description=f"A sentence that uses the term, at most {MAX_CONTEXT} characters."),
]


class Strict(BaseModel):
    """An unknown key is an error, and so is a value of another type: `true` is no number, and "5" is none either."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Prompt(Strict):
    """One request."""

    term: Term
    context: Context = ""


class Route(Prompt):
    """`POST /route`."""


class Define(Strict):
    """`POST /define`: a term, or a list of `requests`."""

    term: Term | None = None
    context: Context = ""
    requests: Annotated[list[Prompt], Field(min_length=1, max_length=MAX_REQUESTS)] | None = None
    domain: Annotated[str, Field(max_length=64, description="auto, base, or a domain's name.")] = "auto"
    sample: Annotated[bool, Field(description="Sample instead of taking the likeliest token.")] = False
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 42
    temperature: Annotated[float, Field(ge=MIN_TEMPERATURE, le=10, allow_inf_nan=False)] = Decoding.temperature
    top_p: Annotated[float, Field(gt=0, le=1)] = Decoding.top_p
    top_k: Annotated[int, Field(ge=0, le=2**20)] = Decoding.top_k
    max_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] = Decoding.max_new_tokens
    stream: Annotated[bool, Field(description="Answer with server-sent events.")] = False
    all_domains: Annotated[bool, Field(description="With it, what every other domain answers.")] = False

    @model_validator(mode="after")
    def _one_or_many(self) -> "Define":
        if (self.term is None) == (self.requests is None):
            raise ValueError("give either a term or requests")
        if self.requests is not None and self.context:
            raise ValueError("context belongs to a term: write contexts into the requests")
        for key in ("temperature", "top_p", "top_k"):
            if key in self.model_fields_set and not self.sample:
                raise ValueError(f"{key} is for sampling: add sample: true, or leave it out")
        return self

    @property
    def prompts(self) -> list[Prompt]:
        """The requests, also of one."""
        return self.requests or [Prompt(term=self.term or "", context=self.context)]

    @property
    def decoding(self) -> Decoding:
        return Decoding(
            method="sample" if self.sample else "greedy",
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            max_new_tokens=self.max_tokens,
            seed=self.seed,
        )


class AddDomains(Strict):
    """`POST /domains`."""

    path: Annotated[str, Field(min_length=1, max_length=1000, description="A pack inside a folder of --packs.")]
    domains: Annotated[list[str], Field(max_length=256, description="Which of its domains; by default all new.")] = []


class StreamOptions(Strict):
    """OpenAI's."""

    include_usage: bool = False


class Sampling(BaseModel):
    """What OpenAI's two interfaces share. Keys of OpenAI's that change nothing here may be there."""

    model_config = ConfigDict(extra="allow", strict=True)
    model: Annotated[str, Field(max_length=64)] = "auto"
    max_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None
    temperature: Annotated[float, Field(ge=0, le=10, allow_inf_nan=False, description="0 is greedy.")] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_SAMPLES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def _nothing_ignored(self) -> "Sampling":
        for key, value in (self.model_extra or {}).items():
            asks = value not in (None, False, 0, "", [], {}, IDLE.get(key)) or (key == "logprobs" and value is not None)
            if key not in IGNORED_KEYS and asks:
                raise ValueError(f"{key[:100]} is not supported: leave it out")
        if self.temperature and self.temperature < MIN_TEMPERATURE:
            raise ValueError(f"temperature is 0 (greedy) or at least {MIN_TEMPERATURE}: take one of these")
        if self.stream_options and not self.stream:
            raise ValueError("stream_options are for streams: add stream: true, or leave them out")
        return self

    @property
    def limit(self) -> int | None:
        """The most tokens of an answer."""
        return self.max_tokens

    @property
    def decoding(self) -> Decoding:
        return Decoding(
            method="sample" if self.temperature else "greedy",
            temperature=self.temperature or Decoding.temperature,
            top_p=self.top_p or Decoding.top_p,
            max_new_tokens=self.limit or Decoding.max_new_tokens,
            seed=Decoding.seed if self.seed is None else self.seed,
        )


class Completion(Sampling):
    """`POST /v1/completions`."""

    prompt: Annotated[
        str | list[str],
        Field(
            description="TERM, or TERM<TAB>CONTEXT; or, with a line end before any tab, a text that is continued as it "
            "is; or a list of these."
        ),
    ]

    @property
    def prompts(self) -> list[Prompt | str]:
        """Terms with contexts, and texts.

        Raises:
            Problem: too many, or one is neither a TERM, TERM<TAB>CONTEXT nor a text that is read.
        """
        prompts = [self.prompt] if isinstance(self.prompt, str) else self.prompt
        if not 1 <= len(prompts) <= MAX_REQUESTS:
            raise Problem(422, "invalid_request", f"prompt: from 1 to {MAX_REQUESTS} prompts are read in one call")
        parts = [prompt.partition("\t") for prompt in prompts]
        texts = ["\n" in term.strip() for term, _, _ in parts]  # in which no term has a line end
        need_texts("prompt", [prompt for prompt, is_text in zip(prompts, texts, strict=True) if is_text])
        try:
            return [
                prompt if is_text else Prompt(term=clean_term(term), context=clean_context(context))
                for prompt, is_text, (term, _, context) in zip(prompts, texts, parts, strict=True)
            ]
        except ValueError as error:
            raise Problem(422, "invalid_request", f"prompt: {error}") from error


class Message(Strict):
    """Of a chat."""

    role: Literal["system", "user", "assistant"]
    content: str


class Chat(Sampling):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None

    @model_validator(mode="after")
    def _one_limit(self) -> "Chat":
        if None not in (self.max_tokens, self.max_completion_tokens):
            raise ValueError("max_completion_tokens is max_tokens under its new name: leave one of them out")
        return self

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def conversation(self) -> list[dict[str, str]]:
        """Roles and contents.

        Raises:
            Problem: a text that is not read.
        """
        need_texts("messages", [message.content for message in self.messages])
        return [message.model_dump() for message in self.messages]


def need_texts(field: str, texts: list[str]) -> None:
    """Raises a Problem where texts to continue are together too long, or hold control characters."""
    length = sum(map(len, texts))
    if length > MAX_TEXT:
        message = f"{field}: {length} characters of text; at most {MAX_TEXT} are read in one call: shorten it"
        raise Problem(400, TOO_LONG, message)
    if not all(is_readable(text, "\n\r\t") for text in texts):
        raise Problem(422, "invalid_request", f"{field}: the text holds control characters: take them out")


TOO_LONG = "context_length_exceeded"  # OpenAI's word
IGNORED_KEYS = ("user", "metadata", "store")
IDLE = {"best_of": 1}  # what asks for nothing
