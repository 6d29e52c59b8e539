"""Parameters and multiply-accumulates of PIIP models, by two rules.

The *published count* is the rule behind the published #Param and #FLOPs; it leaves out the merging convolutions and the
feature pyramid. The *executed count* is what our modules hold and compute for one image. All counts are absolute
numbers of parameters and of multiply-accumulates (one multiply-accumulate is what the published tables call a FLOP).
"""
