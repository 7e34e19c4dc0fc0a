"""Models whose attention patterns can be read, differentiated and edited.

`stepsal.load` makes a `TransformerBridge` by name; `stepsal.bridge.check.check_model` refuses one that can't be served.

Files: `loading` (models by name), `hooks` (hook points), `check` (which models are served), `attention` (scale, window,
soft-cap and sinks, read off the Hugging Face modules), `presets` (how model families mark thinking and summary),
`gradients` (a model ready to be differentiated, and back), `devices` (where a model is, and the memory that is free).
"""
