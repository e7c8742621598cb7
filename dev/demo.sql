-- What dev/demo runs on: the texts, the table the words go to, the buffer that
-- counts them, and the table the counts are stored in.

CREATE EXTENSION statbuffer;

CREATE TABLE source (n bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, word text NOT NULL);
CREATE SEQUENCE reading;

CREATE TABLE words (id bigserial PRIMARY KEY, word text NOT NULL);

CREATE TABLE word_counts (word text PRIMARY KEY, count bigint NOT NULL);

SELECT sb_create('word_hits', 'word_counts', 'count', 'interval=1s', 'jitter=200ms');

CREATE TRIGGER count_word AFTER INSERT ON words
	FOR EACH ROW EXECUTE FUNCTION sb_trigger('word_hits', 'word');

CREATE VIEW compared AS
	SELECT word, stored.count AS stored, exact.count AS exact
	FROM word_counts AS stored
	FULL JOIN (SELECT word, count(*) FROM words GROUP BY word) AS exact USING (word);
