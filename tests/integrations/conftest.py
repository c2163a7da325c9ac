"""The tiny model and corpus of the tests of the study."""

from tests.study.conftest import corpus, documents, model_dir, one_thread, text_dir, tokenizer

__all__ = ["corpus", "documents", "model_dir", "one_thread", "text_dir", "tokenizer"]
