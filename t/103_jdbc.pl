# The JDBC driver counts: batches, as they are and rewritten, connections that
# only read, and updates as Hibernate writes them.  Then Hibernate does.

use strict;
use warnings;

use FindBin;
use lib $FindBin::RealBin;

use ClientTest;
use PostgreSQL::Test::Utils;
use StatbufferTest;
use Test::More;

my $driver = '/usr/share/java/postgresql.jar';
my ($java) = programs('java') or plan skip_all => 'java is not installed';

plan skip_all => 'libpostgresql-jdbc-java is not installed' unless -e $driver;
plan skip_all => 'the java that is installed has no compiler'
  unless can_run("a JDK", $java, '--describe-module', 'jdk.compiler');

my $node = client_node('jdbc');
my $seen = run_client({}, $java, '-cp', $driver, program('java/WithJdbc.java'));

note("JDBC driver $seen->{version}");
is($seen->{batch}, '[1]', 'each statement of a batch has inserted a row');
is($seen->{rewritten}, '[-2]', 'of those that it has made one, it does not know');
is($seen->{'batch error'}, '23502', 'a batch with an error is an error');
is($seen->{executeUpdate}, '0100E', 'executeUpdate() does not take a result');
is($seen->{called}, 4, 'a function is called as one');
is($seen->{readonly}, '25006', 'INSERT is refused where only reading is allowed');
is($seen->{rows}, 1, 'an UPDATE of the view tells that it has updated a row');
is($seen->{'rows of a batch'}, '[1]', 'in a batch, too');
is($seen->{generated}, 'true', 'the key that was generated comes back');
is($seen->{'as read'}, 1, 'an update of a row as it was read');
is($seen->{stale}, 0, 'a row that is not as it was read is not updated');
is($seen->{'both as read'}, '1 and 1', 'two that have read the same both find the row');
is($seen->{both}, 2, 'and both count');
is($seen->{updatable}, '24000', 'a result set of the view is not updatable: it has no primary key');

# What was not in a transaction is counted in spite of the error.
counted('jdbc', $seen, called => 4, readonly => 1);

#
# Hibernate.  Debian has 3.6, which is older than the modules of Java.
#
SKIP:
{
	my @jars = map { "/usr/share/java/$_.jar" } qw(postgresql hibernate-core hibernate3 dom4j antlr commons-collections3
	  geronimo-jpa_2.0_spec geronimo-jta-1.2-spec hibernate-commons-annotations slf4j-api slf4j-nop javassist);
	my ($missing) = grep { !-e } @jars;

	if ($missing)
	{
		diag("not installed, and not tested: libhibernate3-java ($missing)");
		skip 'Hibernate is not installed', 1;
	}
	$seen = run_client({}, $java, '--add-opens', 'java.base/java.lang=ALL-UNNAMED', '-cp', join(':', @jars),
		program('java/WithHibernate.java'));
	is($seen->{hql}, 1, 'Hibernate: an update in the database finds the row');
	is($seen->{'as read'}, 'counted', 'Hibernate: so does one of a row as it was read');
	is("$seen->{meanwhile}, $seen->{late}", 'counted, stale', 'Hibernate: but not if somebody has counted since');
	is($seen->{both}, 'counted and counted', 'Hibernate: two that have read the same find it');
	is("$seen->{total}, $seen->{verb}, $seen->{'verb of both'}", '2, 3, 2', 'Hibernate: the totals');
	is(sql(q{SELECT sb_drain('hits'), sb_drain('article_counts')}), 't|t', 'Hibernate: drained');
	is(sql(q{SELECT views FROM page_views WHERE path = 'hibernate/one'}), 2, 'Hibernate: a model on the buffer has counted');
	is(sql(q{SELECT string_agg(title || ' ' || views, ', ' ORDER BY id) FROM articles WHERE title LIKE 'hibernate%'}),
		'hibernate 3, hibernate both 2', 'Hibernate: the sums are exact');
}

has_not_crashed($node, 'no process has crashed');
$node->stop;
done_testing();
