# Views of targets with their totals: sessions that increment the column at the
# same time, while flushes commit, lose nothing and count nothing twice; rows that
# are moved and deleted take along what is counted; and views are dumped and
# restored.

use strict;
use warnings;

use FindBin;
use lib $FindBin::RealBin;

use PostgreSQL::Test::Utils;
use StatbufferTest;
use Test::More;

my $node = new_node('view');

sql(q{
	CREATE TABLE pages (id int PRIMARY KEY, title text DEFAULT 'untitled', likes int NOT NULL DEFAULT 0, views bigint NOT NULL DEFAULT 0);
	INSERT INTO pages SELECT i FROM generate_series(1, 5) i;
	SELECT sb_create('hits', 'pages', 'views', 'interval=1ms', 'backoff=1ms');
	SELECT sb_create_view('page_counts', 'hits');

	-- Increment each page, with a like in one of ten, which may have to be retried.
	CREATE TABLE retries (n int);
	CREATE PROCEDURE count_pages(n int) LANGUAGE plpgsql AS $$
	DECLARE
		failed bool;
		nretries int := 0;
	BEGIN
		FOR i IN 1 .. n LOOP
			LOOP
				BEGIN
					IF i % 10 = 0 THEN
						UPDATE page_counts SET likes = likes + 1, views = views + 1 WHERE id = i % 5 + 1;
					ELSE
						UPDATE page_counts SET views = views + 1 WHERE id = i % 5 + 1;
					END IF;
					failed := false;
				EXCEPTION WHEN serialization_failure THEN
					failed := true;
					nretries := nretries + 1;
				END;
				COMMIT;
				EXIT WHEN NOT failed;
			END LOOP;
		END LOOP;
		INSERT INTO retries VALUES (nretries);
	END $$;
});

#
# Four sessions increment
#
my $n = sized(500, 50);
my @sessions = map { start_session($node, 'postgres', "CALL count_pages($n)") } 1 .. 4;
finish_session($_, 'incremented') for @sessions;
is(sql('SELECT sum(views), sum(likes) FROM page_counts'), 4 * $n . '|' . 4 * $n / 10, 'all is counted');
is(sql(q{SELECT sb_drain('hits')}), 't', 'drained');
is(sql('SELECT sum(views), sum(likes) FROM pages'), 4 * $n . '|' . 4 * $n / 10, 'and stored, once');
note(sql('SELECT sum(n) FROM retries') . ' retries');

#
# Rows that are moved, set to a value and deleted while flushes commit.  One
# session does all that, so it knows what it must find.
#
sql(q{
	CREATE PROCEDURE move_pages(n int) LANGUAGE plpgsql AS $$
	DECLARE
		total bigint := 0;
		found bigint;
		here int := 100;
	BEGIN
		INSERT INTO page_counts (id) VALUES (here);
		FOR i IN 1 .. n LOOP
			UPDATE page_counts SET views = views + i WHERE id = here;
			COMMIT;
			total := total + i;
			IF i % 3 = 0 THEN
				UPDATE page_counts SET id = here + 1, views = views + 1 WHERE id = here;
				COMMIT;
				here := here + 1;
				total := total + 1;
			END IF;
			IF i % 50 = 0 THEN
				UPDATE page_counts SET views = 5 WHERE id = here;
				COMMIT;
				total := 5;
			END IF;
			SELECT views INTO STRICT found FROM page_counts WHERE id = here;
			IF found <> total THEN
				RAISE 'the total is % and not % after % increments', found, total, i;
			END IF;
		END LOOP;
		SELECT sum(sb_total(id, 'hits')) INTO found FROM generate_series(100, here - 1) id;
		IF found <> 0 THEN
			RAISE 'former keys have a total of %', found;
		END IF;
		DELETE FROM page_counts WHERE id >= 100;
		COMMIT;
		SELECT sum(sb_total(id, 'hits')) INTO found FROM generate_series(100, here) id;
		IF found <> 0 THEN
			RAISE 'what was deleted has a total of %', found;
		END IF;
	END $$;
});
finish_session(start_session($node, 'postgres', 'CALL move_pages(' . sized(500, 20) . ')'), 'each total was right');
is(sql(q{SELECT sb_drain('hits')}), 't', 'drained');
is(sql('SELECT count(*) FROM pages WHERE id >= 100 AND views <> 0'), 0, 'rows that a flush has brought back have nothing');

#
# Dump and restore: the view, its defaults and its trigger
#
my $dump = PostgreSQL::Test::Utils::tempdir() . '/view.sql';
$node->command_ok([ 'pg_dump', '-d', $node->connstr('postgres'), '-f', $dump ], 'dumped');
sql('CREATE DATABASE restored');
$node->command_ok([ 'psql', '-X', '-q', '-v', 'ON_ERROR_STOP=1', '-d', $node->connstr('restored'), '-f', $dump ],
	'restored');
is($node->safe_psql('restored', q{
	INSERT INTO page_counts (id) VALUES (1000);
	UPDATE page_counts SET views = views + 7 WHERE id = 1000;
	SELECT title, views, sb_count(1000, 'hits') IS NOT NULL FROM page_counts WHERE id = 1000;
}), 'untitled|7|t', 'the restored view counts');

has_not_crashed($node, 'no process has crashed');
done_testing();
