# Ruby's clients count: ruby-pg and ActiveRecord; and what is in its schema.rb
# and structure.sql.

use strict;
use warnings;

use FindBin;
use lib $FindBin::RealBin;

use ClientTest;
use PostgreSQL::Test::Utils;
use StatbufferTest;
use Test::More;

my ($ruby) = programs('ruby') or plan skip_all => 'ruby is not installed';
my $node = client_node('ruby');
my $tested = 0;

sub has
{
	my ($package, $library) = @_;
	my $has = can_run($package, $ruby, '-e', "require '$library'");

	$tested++ if $has;
	return $has;
}

if (has('ruby-pg', 'pg'))
{
	my $seen = run_client({}, $ruby, program('ruby/with_pg.rb'));

	is($seen->{failed}, 0, 'all of a pipeline succeeds');
	is($seen->{row}, '42P18', 'parameters in ROW() have no type');
	is($seen->{rollback}, 'undo', 'a transaction was rolled back');
	is($seen->{typed}, 10, 'a total in binary');
	is($seen->{rows}, 1, 'an UPDATE of the view tells that it has updated a row');
	is($seen->{returned}, 3, 'RETURNING has what was added');
	counted('ruby-pg', $seen, typed => 10);
}

if (has('ruby-activerecord', 'active_record'))
{
	sql(q{
		CREATE TABLE comments (id serial PRIMARY KEY, article_id int NOT NULL REFERENCES articles);
		GRANT SELECT, INSERT, UPDATE, DELETE ON comments TO shop;
		GRANT USAGE ON comments_id_seq TO shop;
	});
	my $seen = run_client({}, $ruby, program('ruby/with_activerecord.rb'));

	note("ActiveRecord $seen->{version}");
	is($seen->{read}, 0, 'a new row of the view');
	is($seen->{rows}, 1, 'update_counters() tells that it has updated a row');
	is($seen->{'counter cache'}, 2, 'a counter cache counts up and down');
	is($seen->{reset}, 2, 'and is reset');
	is($seen->{computed}, 12, 'the column of a counter cache is not saved');
	is($seen->{'computed, no cache'}, 3, 'of another, a value that it has computed itself is absolute');
	is($seen->{renamed}, 3, 'another column is updated, with the row locked');
	is($seen->{update}, 'cannot update buffer "hits"', 'the buffer cannot be updated');
	is($seen->{schema}, 'articles comments page_views visits', 'schema.rb has neither buffers nor views');
	like($seen->{extensions}, qr/statbuffer/, 'but it has the extension');
	counted('activerecord', $seen);

	# The structure has all of it.  The extension takes a superuser.
	my $superuser = sql('SELECT current_user');
	$seen = run_client({ client_environment(undef, 'structured', $superuser) },
		$ruby, program('ruby/with_activerecord.rb'), 'structure', $node->basedir);
	is($seen->{verb}, 1, 'structure.sql has them');
}

plan skip_all => 'none of these clients is installed' unless $tested;
has_not_crashed($node, 'no process has crashed');
$node->stop;
done_testing();
