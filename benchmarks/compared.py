"""What benchmarks/accuracy.py calls the methods that its tables and figures treat apart; needs no torch."""

RECIPE = "FLoRA, gradient start, ranks by spectrum, orthonormal"  # what all others are compared with
RIVALS = ("LoRA", "rsLoRA", "DoRA", "AdaLoRA", "LoHa", "LoKr")
GRADIENT_RIVALS = {  # and what tables call them for short
    "LoRA, gradient start": "start",
    "LoRA, gradient start, ranks by spectrum": "start and ranks",
    "LoRA, gradient start, ranks by spectrum, orthonormal": "start, ranks and retraction",
    "LoRA-GA": "LoRA-GA",
}
WITHOUT_BUDGET = ("head only", "BitFit", "full fine-tuning")
