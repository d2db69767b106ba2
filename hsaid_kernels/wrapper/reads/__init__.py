"""How is a read of `layer.weight` answered?"""
