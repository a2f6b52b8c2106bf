"""``dmh bench``"""
def add_parser(commands): pass
