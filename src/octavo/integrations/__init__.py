"""Where other libraries call Octavo: `transformers` (its quantizer plugin), and what PEFT, accelerate and vLLM need."""
