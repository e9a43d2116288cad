"""How alike texts are to a sentence embedding model: a directory as sentence-transformers reads it."""

from collections.abc import Sequence
from pathlib import Path

from kdkernels.errors import InputError, MissingPackage
from kdkernels.training.run.hashes import sha256_of_all


class Embedding:
    """A sentence embedding model E; two texts are as alike as the cosine of E(p) and E(q).

    Attributes:
        cut: how many texts were longer than the model reads: it knows only their beginning.
        length: the tokens that it reads.

    Raises:
        InputError: the directory `path` has no such model.
        MissingPackage: without the package `sentence-transformers`.
    """

    def __init__(self, path: str):
        try:
            from sentence_transformers import SentenceTransformer
        except ModuleNotFoundError as error:
            raise MissingPackage(
                'diversity "embedding" needs sentence-transformers: pip install kdkernels[curation]'
            ) from error
        try:
            self._model = SentenceTransformer(path, local_files_only=True)
        except Exception as error:  # its errors have no type in common
            said = f"{path} cannot be read as a sentence-transformers model: {error}"
            raise InputError(f"[curation] embedding: {said}") from error
        self.length, self.cut = self._model.max_seq_length, 0

    def similarities(self, texts: Sequence[str]) -> list[list[float]]:
        """[n, n]: the cosine of each two of n texts."""
        if self.length is not None:
            ids = self._model.tokenizer(list(texts), verbose=False)["input_ids"]
            self.cut += sum(len(one) > self.length for one in ids)
        vectors = self._model.encode(list(texts), normalize_embeddings=True, show_progress_bar=False)
        vectors = vectors.astype("float64")
        return (vectors @ vectors.T).tolist()


def identity(path: str) -> dict[str, str]:
    """The SHA-256 of every file of the model. Raises OSError."""
    files = sorted(file for file in Path(path).rglob("*") if file.is_file())
    names = [file.relative_to(path).as_posix() for file in files]
    return dict(zip(names, sha256_of_all(files), strict=True))
