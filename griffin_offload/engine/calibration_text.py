"""Pages of prose, dialogue, figures and code: what a model reads before its matrices are quantised to int4."""

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

The city of Lindau stands on an island in Lake Constance, joined to the shore by a bridge for cars and a dam for \
trains. It was first named in a document of the year 882 and was a free city of the Empire from 1275 until 1802. Its \
lighthouse, 33 metres high, has a clock in its wall; opposite sits a lion of stone. In the nineteenth century the \
harbour was rebuilt for steamships, and most of the old walls were taken down. Today about 3,000 people live on the \
island itself and 22,000 in the districts on the mainland.

"You are late," said Margaret, without looking up from the letter. "I know it," he answered, "and I have no excuse \
that would please you. The coach lost a wheel at the mill, and then it rained." She folded the paper slowly. "My \
brother writes that he will not return before the spring. He asks after your horse, and not one word about our \
father. What do you make of that?" He took off his wet gloves and laid them before the fire. He had known her too \
long to answer quickly; besides, he had seen the brother only a week ago, in a place where he ought not to have been.

The album was released on 14 May 1996 and sold 240,000 copies in its first month. Critics were divided: one magazine \
praised the second side as "the warmest twenty minutes of the decade", while another found the songs too long and the \
singer too careful. The band toured Europe and Japan until November. The drummer, who had joined only the year \
before, left after the last concert; he was replaced by his own teacher. Two of the singles entered the charts, at \
number 11 and number 38.

In mathematics, a prime number is a whole number greater than 1 that has no divisors except 1 and itself. There are \
infinitely many of them. Suppose there were only finitely many, p1, p2, ..., pn. The number N = p1 * p2 * ... * pn + \
1 leaves the remainder 1 when it is divided by any of them, so it has a prime divisor that is not in the list, which \
is a contradiction. The primes below 30 are 2, 3, 5, 7, 11, 13, 17, 19, 23 and 29.

User: My laptop does not start any more. The fan runs for two seconds, and then nothing happens.
Assistant: That sounds like a problem with power or memory. Please try the following steps:
1. Unplug the charger, hold the power button for 15 seconds, and plug it in again.
2. If it can be opened, take out one memory module at a time and try to start with the other.
3. Listen whether it beeps, and count how often.
If nothing changes, tell me the model and what you did last before it failed.
User: It beeps twice. I spilled some tea on it yesterday, but it worked afterwards.
Assistant: Then please leave it switched off. Liquid can reach the board hours later.

Once there was a little bear who was afraid of the dark. Every night he asked his mother to leave the lamp on, and \
every night she did. One evening the lamp was empty. "Come outside with me," said his mother. They sat on the hill, \
and it was very dark, and then the bear saw that the sky was full of small lights. "Who lit all of them?" he asked. \
"Nobody had to," she said. "They are always there. It only has to be dark enough to see them." The little bear \
counted to eleven and fell asleep.

{"name": "order-1042", "date": "2019-08-30", "items": [{"sku": "A-17", "count": 3, "price": 4.95}, {"sku": "C-02", \
"count": 1, "price": 129.0}], "paid": true, "address": {"street": "12 Mill Lane", "city": "Leeds", "zip": "LS1 4AB"}}

SELECT customer.name, SUM(invoice.amount) AS total
FROM customer JOIN invoice ON invoice.customer_id = customer.id
WHERE invoice.date >= '2020-01-01'
GROUP BY customer.name
ORDER BY total DESC
LIMIT 10;

Der Zug nach Basel fährt heute von Gleis 7 und hat etwa zwanzig Minuten Verspätung. Wir bitten um Ihr Verständnis. La \
bibliothèque est fermée le lundi, mais on peut rendre les livres dans la boîte près de la porte. Mi abuela decía que \
el pan de ayer es la sopa de mañana, y casi siempre tenía razón.

The heart of a resting adult beats about 70 times a minute and moves five litres of blood in that time. Blood from \
the body enters the right atrium, passes into the right ventricle and is pumped to the lungs, where it gives off \
carbon dioxide and takes up oxygen. It returns to the left side, whose wall is much thicker, because it has to drive \
the blood through the whole body. Valves between the chambers keep it from flowing back; what a doctor hears through \
a stethoscope is their closing.

The court held that the contract had not been broken. The seller had promised delivery "in the course of June", and \
the goods had arrived on the thirtieth. It did not matter that the buyer had expected them earlier, since he had \
never said so in writing. Two judges dissented. In their view a merchant who orders fruit for a festival on the tenth \
need not explain that he wants it before the festival.

#include <stdio.h>

int main(int argc, char **argv) {
    long lines = 0;
    for (int c; (c = getchar()) != EOF;)
        if (c == '\\n') lines++;
    printf("%ld\\n", lines);
    return argc > 1 ? 1 : 0;
}

The expedition left the last village on the third of September with eleven mules and food for forty days. For a week \
the path followed the river; then it climbed through forests of oak and fir to a pass which none of the maps showed. \
The guide said that shepherds used it in dry years. On the far side they found a valley without a single house, and \
in the middle of it a wall of cut stone, half buried, that ran straight for more than a mile. The captain measured \
it, drew it twice, and wrote in his diary that he did not expect to be believed.

How to repot a plant: choose a pot two centimetres wider than the old one. Water the plant an hour before. Turn it \
upside down, hold the stem between two fingers and tap the edge of the pot on a table. Loosen the roots, cut off \
those that are brown or soft, and set it no deeper than it stood. Fill the gaps with fresh soil, press it down \
lightly, and keep it out of the sun for a week.

Share prices fell sharply on Tuesday after the central bank raised its main rate by half a point, to 4.25 per cent. \
The index of the thirty largest companies lost 2.3 per cent and closed at 11,480. Banks gained, builders and \
retailers were among the losers. "Nobody expected it before autumn," an analyst said, "and nobody knows now what will \
come in autumn." The bank's president defended the step: prices had risen by six per cent within a year, wages by \
nearly as much. Unions and employers both criticised the decision, the former because it would cost jobs, the latter \
because it had come without any warning.
"""
