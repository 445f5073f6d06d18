"""Writing an adapter into the weights of a model: `merge` plans and writes, `adapter_files` reads PEFT's folders."""
