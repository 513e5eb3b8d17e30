"""The Java programs behind caption metrics, run so that they can fail but never hang or litter.

pycocoevalcap ships the Stanford PTB tokenizer and METEOR 1.5 as jars, and SPICE 1.0 without the Stanford
CoreNLP models that it needs. Its own wrappers write into the installed package, wait for ever, misalign
captions that hold unusual line separators, and print; so here the same jars are run with the same arguments,
in a process group that is killed at a deadline, and what comes back is counted before it is believed.
"""

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, NamedTuple

CORENLP_JARS = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")


class ProgramError(Exception):
    """A Java program could not be run to its end; the message says why."""


def tokenize(texts: Sequence[str], timeout_s: float) -> list[str]:
    """Texts as the Stanford PTB tokenizer (CoreNLP 3.4.1) splits them, lower-cased, tokens joined by blanks.

    Raises:
        ProgramError: Java is missing, fails, is too slow, or returns another number of lines.
    """
    jar = _folder() / "tokenizer" / "stanford-corenlp-3.4.1.jar"
    arguments = ["-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"]
    arguments += ["-encoding", "UTF-8"]
    # Any white space ends up as one blank: the tokenizer would end a line at a form feed or U+2028 too.
    lines = "".join(" ".join(text.split()) + "\n" for text in texts)
    with _running("the PTB tokenizer", arguments, timeout_s) as program:
        output, _ = program.process.communicate(lines.encode("utf-8", "replace"))
        program.check_exit()
    tokenized = output.decode("utf-8", "replace").split("\n")[:-1]
    if len(tokenized) != len(texts):
        raise ProgramError(f"the PTB tokenizer returned {len(tokenized)} lines for {len(texts)} texts")
    return [line.strip() for line in tokenized]


def meteor(predictions: Sequence[str], references: Sequence[Sequence[str]], timeout_s: float) -> float:
    """METEOR 1.5 of a corpus of tokenized captions (English, `-norm`), from its statistics added up.

    Raises:
        ProgramError: Java is missing, fails, or is too slow.
    """
    jar = _folder() / "meteor" / "meteor-1.5.jar"
    arguments = ["-Xmx2G", "-jar", str(jar), "-", "-", "-stdio", "-l", "en", "-norm"]
    requests = "".join(
        " ||| ".join(["SCORE", *map(_without_bars, truths), _without_bars(prediction)]) + "\n"
        for prediction, truths in zip(predictions, references, strict=True)
    )
    with _running("METEOR", arguments, timeout_s) as program:
        # Answers are read while requests are still being written: two full pipes would wait for each other.
        writer = threading.Thread(target=program.write, args=(requests,), daemon=True)
        writer.start()
        statistics = [program.read_line() for _ in predictions]
        writer.join()
        program.write(" ||| ".join(["EVAL", *statistics]) + "\n")
        answers = [program.read_line() for _ in range(len(predictions) + 1)]
    try:
        return float(answers[-1])  # one score a caption, then the corpus
    except ValueError as error:
        raise ProgramError(f"METEOR answered {answers[-1]!r} instead of a score") from error


def spice(predictions: Sequence[str], references: Sequence[Sequence[str]], timeout_s: float) -> float:
    """SPICE 1.0: mean over captions of the F-score over scene-graph tuples.

    Raises:
        ProgramError: Java or the CoreNLP models are missing, or it fails or is too slow.
    """
    folder = _folder() / "spice"
    if not all((folder / "lib" / name).is_file() for name in CORENLP_JARS):
        raise ProgramError(
            "SPICE needs the Stanford CoreNLP 3.6.0 models, which are not installed; download them once with "
            "`python -m pycocoevalcap.spice.get_stanford_models`"
        )
    items = [
        {"image_id": number, "test": prediction, "refs": list(truths)}
        for number, (prediction, truths) in enumerate(zip(predictions, references, strict=True))
    ]
    with tempfile.TemporaryDirectory() as scratch:
        questions, answers = Path(scratch, "captions.json"), Path(scratch, "scores.json")
        questions.write_text(json.dumps(items))
        jar = folder / "spice-1.0.jar"
        arguments = ["-Xmx8G", "-jar", str(jar), str(questions), "-out", str(answers), "-subset", "-silent"]
        with _running("SPICE", arguments, timeout_s) as program:
            program.process.communicate()
            program.check_exit()
        try:
            scores = [float(item["scores"]["All"]["f"]) for item in json.loads(answers.read_text())]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ProgramError(f"SPICE wrote no readable scores ({error})") from error
    if len(scores) != len(items):
        raise ProgramError(f"SPICE returned {len(scores)} scores for {len(items)} captions")
    return sum(scores) / len(scores)


class _Program(NamedTuple):
    """A Java program that is running, and what is known when it fails."""

    name: str
    process: subprocess.Popen
    errors: IO[bytes]
    timeout_s: float
    was_killed: threading.Event

    def write(self, text: str) -> None:
        """Send text; a program that has died is noticed by whoever reads its answer."""
        stdin = self.process.stdin
        assert stdin is not None
        with contextlib.suppress(OSError, ValueError):
            stdin.write(text.encode("utf-8", "replace"))
            stdin.flush()

    def read_line(self) -> str:
        """The next line that the program prints."""
        stdout = self.process.stdout
        assert stdout is not None
        line = stdout.readline()
        if not line.endswith(b"\n"):
            self.process.wait()
            raise self.failure()
        return line.decode("utf-8", "replace").strip()

    def check_exit(self) -> None:
        """Raise unless the program ended well."""
        if self.process.returncode != 0:
            raise self.failure()

    def failure(self) -> ProgramError:
        """What to say about a program that ended too early."""
        if self.was_killed.is_set():
            return ProgramError(f"{self.name} was stopped after {self.timeout_s:g} s")
        self.errors.seek(0)
        lines = [line.strip() for line in self.errors.read().decode("utf-8", "replace").splitlines()]
        last = next((line for line in reversed(lines) if line), "no message")
        return ProgramError(f"{self.name} failed with exit status {self.process.returncode}: {last[:200]}")


@contextlib.contextmanager
def _running(name: str, arguments: Sequence[str], timeout_s: float) -> Iterator[_Program]:
    """Start `java` with arguments; whatever happens, it and its children are gone when the block is left."""
    java = shutil.which("java")
    if java is None:
        raise ProgramError(f"{name} needs Java, and no program named java is on the PATH")
    with tempfile.TemporaryFile() as errors:
        try:
            process = subprocess.Popen(
                [java, "-Dfile.encoding=UTF-8", *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                start_new_session=True,
            )
        except OSError as error:
            raise ProgramError(f"{name} needs Java, and {java} does not start: {error.strerror}") from error
        was_killed = threading.Event()

        def kill() -> None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)

        def kill_at_the_deadline() -> None:
            was_killed.set()
            kill()

        deadline = threading.Timer(timeout_s, kill_at_the_deadline)
        deadline.daemon = True
        deadline.start()
        try:
            yield _Program(name, process, errors, timeout_s, was_killed)
        finally:
            deadline.cancel()
            kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                assert pipe is not None
                with contextlib.suppress(OSError):  # closing flushes to a program that no longer reads
                    pipe.close()


def _without_bars(text: str) -> str:
    """Text without METEOR's field separator, blanks single, on one line."""
    return " ".join(text.replace("|||", " ").split())


def _folder() -> Path:
    """Where pycocoevalcap and its jars are installed."""
    spec = importlib.util.find_spec("pycocoevalcap")
    assert spec is not None and spec.submodule_search_locations
    return Path(next(iter(spec.submodule_search_locations)))
