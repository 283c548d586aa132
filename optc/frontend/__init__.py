"""The frontend: from a name, a module or a file to a Program. (Not called ``capture``, so ``optc.capture`` stays a function.)"""
