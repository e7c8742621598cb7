-- What dev/demo runs on: the texts, the table the words go to, the buffer that
-- counts them, and the table the counts are stored in.

CREATE EXTENSION statbuffer;

CREATE TABLE source (n bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, word text NOT NULL);
CREATE SEQUENCE reading;

CREATE TABLE words (id bigserial PRIMARY KEY, word text NOT NULL);

CREATE TABLE word_counts (word text PRIMARY KEY, count bigint NOT NULL);

CREATE FUNCTION store_words(words text[], counts bigint[]) RETURNS void LANGUAGE sql AS $$
	INSERT INTO word_counts
	SELECT * FROM unnest(words, counts)
	ON CONFLICT (word) DO UPDATE SET count = word_counts.count + EXCLUDED.count
$$;

CREATE FOREIGN TABLE word_hits (word text NOT NULL, count bigint NOT NULL DEFAULT 1)
	SERVER statbuffer OPTIONS (handler 'store_words', interval '1s', jitter '200ms');

CREATE FUNCTION count_word() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
	PERFORM sb_increment(NEW.word, buffer => 'word_hits');
	RETURN NULL;
END
$$;

CREATE TRIGGER count_word AFTER INSERT ON words
	FOR EACH ROW EXECUTE FUNCTION count_word();

CREATE VIEW compared AS
	SELECT word, stored.count AS stored, exact.count AS exact
	FROM word_counts AS stored
	FULL JOIN (SELECT word, count(*) FROM words GROUP BY word) AS exact USING (word);
