"""Rationales rewritten for the student that is to learn them: the second stage of TwT (docs/TWT.md).

    from kdkernels.compression import TeacherCompressor
    from kdkernels.training import run_stages
    run_stages(["recipe.toml"], compressor=TeacherCompressor())

Source: "TwT: Thinking without Tokens by Habitual Reasoning Distillation with Multi-Teachers' Guidance", section 3.2.
"""

from kdkernels.compression.compressor import TeacherCompressor

__all__ = ["TeacherCompressor"]
