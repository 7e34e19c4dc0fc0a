"""Models whose attention patterns can be read, differentiated and edited.

`loading` makes a `TransformerBridge` by name; `hooks` names the hook points and refuses models that can't be served;
`attention` reads what a model does around its softmaxes off the Hugging Face modules; `presets` knows model families;
`devices` says where a model is and what is free there.
"""
