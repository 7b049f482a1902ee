# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0
"""Plain English words for keys and lists. None is a part of another: one that is found in an answer is really there."""

_ADJECTIVES = """
    amber ample ancient arctic autumn azure basic bitter blunt brave brazen brief bright brisk broken bronze calm
    careful cheerful chilly civil clever cloudy clumsy cosmic costly crimson crisp curious damp dapper daring decent
    distant dusty eager early earnest elegant endless even faint famous fancy fearless fierce firm fluffy fond
    fragile frank frosty frozen gentle giant glad gleaming global golden graceful grand grateful gray green handy
    happy harsh hasty hidden hollow honest humble hungry idle jolly keen kind lavish lazy lively lonely loyal lucky
    lunar mellow merry mighty misty modest muddy narrow neat nimble noble noisy novel odd olive orange oval pale
    patient plain polite precious pretty proud purple quaint quick quiet rapid rare ready restless rich rigid robust
    rosy rough royal rustic sacred scarlet secret serene shallow sharp shiny shy silent silver simple sincere sleepy
    slender slow smooth snowy sober solar solid sour spare speedy spicy steady stern stormy strange sturdy subtle
    sudden sunny swift tame tender thick thirsty tidy tiny tough tranquil true trusty urban useful valiant velvet
    vivid warm wary weary wicked wild windy wise witty wooden young zealous
"""
ADJECTIVES = tuple(_ADJECTIVES.split())

_NOUNS = """
    acorn anchor antler apricot badger bakery balcony bamboo banjo barrel basket beacon beaver bison blanket bottle
    boulder branch bridge bucket button cabin cactus camel candle canoe canyon carpet castle cavern cedar chimney
    cinema circle clover cobra comet compass copper coral cottage cradle crayon cricket crystal curtain cushion
    daisy desert dolphin donkey dragon drawer drum eagle engine falcon feather ferry fiddle flute forest fountain
    fox galaxy garden garlic geyser ginger giraffe glacier goblet gondola goose guitar hammer harbor harvest hazel
    helmet heron hornet island ivory jacket jasmine jewel jigsaw juniper kayak kettle kitten ladder lagoon lantern
    lemon leopard library lobster locket lotus magnet mango mantle maple marble meadow melon mirror monkey mosaic
    mountain muffin napkin needle nickel oasis ocean octopus orchard orchid otter oyster paddle palace panther
    parrot pebble pelican pencil pepper piano pigeon pillow pioneer planet plaza pocket pony prairie puddle puzzle
    quarry quilt rabbit raccoon radish raven ribbon river rocket saddle salmon sandal saucer scooter shadow shelter
    shovel sparrow spider squirrel stadium statue sunset tablet tavern teapot temple thimble thunder ticket tiger
    timber tomato torch tractor trumpet tulip tunnel turtle umbrella valley vessel violin volcano wagon walnut
    walrus whistle willow window winter wizard yogurt zebra zipper
"""
NOUNS = tuple(_NOUNS.split())
