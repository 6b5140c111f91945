"""config.json, model.safetensors and tokenizer.json as worker/model reads them."""
import json
import os
import struct

import torch


def write_safetensors(path, tensors):
    """f16, in the order given. Format: u64 header length, JSON header, data; the header padded to 8 bytes."""
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in tensors.items():
        size = tensor.numel() * 2
        header[name] = {"dtype": "F16", "shape": list(tensor.shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path + ".tmp", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            file.write(tensor.detach().to("cpu", torch.float16).contiguous().numpy().tobytes())
    os.replace(path + ".tmp", path)


def read_safetensors(path):
    with open(path, "rb") as file:
        data = file.read()
    length = struct.unpack("<Q", data[:8])[0]
    tensors = {}
    for name, entry in json.loads(data[8:8 + length]).items():
        if name == "__metadata__":
            continue
        begin, end = (8 + length + x for x in entry["data_offsets"])
        tensors[name] = torch.frombuffer(bytearray(data[begin:end]), dtype=torch.float16).reshape(entry["shape"])
    return tensors


def config_json(config):
    fixed = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "attention_bias": False,
             "mlp_bias": False, "tie_word_embeddings": True, "torch_dtype": "float16", "bos_token_id": 1,
             "eos_token_id": 5, "pad_token_id": 0}
    return dict(fixed, **config)


def export(directory, network, config, vocabulary):
    os.makedirs(directory, exist_ok=True)
    write_safetensors(os.path.join(directory, "model.safetensors"), network.state_dict())
    for name, content in (("config.json", config_json(config)), ("tokenizer.json", vocabulary.tokenizer_json())):
        with open(os.path.join(directory, name), "w", encoding="utf-8") as file:
            json.dump(content, file, ensure_ascii=False, indent=1)
