"""A page of prose, dialogue, figures and code: what a model reads before its matrices are quantised to int4."""

CALIBRATION_TEXT = """\
The harbour was quiet when the first ferry came in. Two men threw the ropes over the iron posts, an old woman \
counted her coins, and a boy asked whether the island on the other side was larger than the town. "It has one \
road and forty goats," said the captain, "and nobody there has ever locked a door." The boy did not believe him, \
but he bought a ticket.

Sound travels through water more than four times as fast as through air. In sea water of ten degrees it covers \
about 1,490 metres in a second, in air only 337. Ships have used this since 1912: a short pulse is sent down, \
its echo returns from the ground, and half the time between them, multiplied by the speed, is the depth. A warm \
layer near the surface bends the waves and can make the ground appear deeper than it is.

Question: A train leaves at 9:40 and arrives at 13:05. It waits for 15 minutes on the way. How long does it \
move?
Answer: From 9:40 to 13:05 are 3 hours and 25 minutes. Without the 15 minutes it moves for 3 hours and 10 \
minutes.

def longest_run(numbers):
    # Length of the longest stretch of equal neighbours.
    best = count = 0
    for i, number in enumerate(numbers):
        count = count + 1 if i and number == numbers[i - 1] else 1
        best = max(best, count)
    return best

To make bread for four people, mix 500 g of flour with 330 ml of water, 10 g of salt and a spoon of yeast. Let \
the dough rest overnight in a cool place. Heat the oven to 230 degrees, fold the dough twice, and bake it until \
it sounds hollow. Do not cut it while it is hot, even if everybody is waiting.

The committee met again in March. Its members agreed that the bridge should be repaired before winter, but not \
on who should pay for it. The government of the province offered a third of the cost; the railway company, whose \
trains no longer stop there, offered nothing. "We are not a charity," its director told the newspaper, and the \
mayor answered that a company which had been given the land for one crown a year might remember the favour.

Dear Anna, thank you for your letter of the 5th. Yes, we would like to come, all three of us, and we shall bring \
the small tent. Is there still the problem with the well? If so, please say how many bottles we should carry. \
Yours, Martin
"""
