"""Models whose attention patterns can be read, differentiated and edited.

`loading` makes a `TransformerBridge` by name. `hooks` names the hook points and refuses models that can't be served.
`attention` reads what a model does around its softmaxes off the Hugging Face modules. `presets` knows how model
families mark thinking and summary. `gradients` puts a model into the state in which it is differentiated, and back.
`devices` tells where a model is and how much memory is free there.
"""
