"""The devices of all boxes, what uses them and which are closed: loractl gpus, drain and undrain.

Others use answer.
"""
